"""While transformers reads a quantized base, each layer leaves the accelerator before the next one is read."""

from __future__ import annotations

import contextlib
import contextvars
import os
import threading
import weakref
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch.loading import streaming

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.quantizers import HfQuantizer

_SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"
"""transformers' variable: its threads would fill the accelerator faster than layers leave it."""

_READ: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models whose tensors are being read."""

_MOVES = "create_quantized_param"
"""The quantizer's method by which transformers before 5.0 sets a tensor that is quantized, or becomes so."""

_TURN = threading.RLock()
"""Held by the thread that reads a file: transformers may be asked to read several at once."""

_inside = contextvars.ContextVar("trainer_fsdp_patch_reads", default=False)


def is_read(model: object) -> bool:
    """Whether the tensors of a model are being read, in the way of `in_turn`.

    Args:
        model: or anything else.
    """
    return bool(_READ) and any(model is item for item in _READ)


def is_inside() -> bool:
    """Whether this thread is inside `settled`."""
    return _inside.get()


@contextlib.contextmanager
def in_turn(model: PreTrainedModel) -> Iterator[None]:
    """Have transformers 5 read one tensor of a model after the other.

    Args:
        model: whose tensors are read inside.
    """
    before = os.environ.get(_SEQUENTIAL)
    os.environ[_SEQUENTIAL] = "1"
    _READ.add(model)
    try:
        yield
    finally:
        _READ.discard(model)
        if before is None:
            del os.environ[_SEQUENTIAL]
        else:
            os.environ[_SEQUENTIAL] = before


@contextlib.contextmanager
def settled(model: PreTrainedModel, quantizer: HfQuantizer) -> Iterator[None]:
    """Take each layer off the accelerator that transformers before 5.0 reads inside, from one file of a checkpoint.

    Such releases move what was quantized by themselves. They make the tensor anew of its class and attributes, which
    quanto's and torchao's classes refuse, and leave scales and the second name of 8-bit weights where they are. So they
    are told inside that no run is under FSDP.

    Args:
        model: that is read.
        quantizer: its own. Its method is another one inside.
    """
    layers = [name for name, _ in model.named_modules()]
    known = frozenset(layers)
    # Looked up in turn: another thread's method would be taken for the quantizer's own, and left there.
    with _TURN:
        create, before = getattr(quantizer, _MOVES), vars(quantizer).get(_MOVES)

        def moves(owner: PreTrainedModel, value: object, name: str, *args: Any, **kwargs: Any) -> object:
            result = create(owner, value, name, *args, **kwargs)
            streaming.settle(model, f"{_layer_of(name, known)}.")
            return result

        vars(quantizer)[_MOVES] = moves
        token = _inside.set(True)
        try:
            yield
        finally:
            _inside.reset(token)
            del vars(quantizer)[_MOVES]
            if before is not None:
                vars(quantizer)[_MOVES] = before
        # What is not quantized was set without the method.
        for name in layers:
            streaming.settle(model, f"{name}.")


def _layer_of(name: str, layers: Collection[str]) -> str:
    """The layer that a tensor is of: a checkpoint names a weight's own tensors below the weight."""
    while name not in layers:
        name = name.rpartition(".")[0]
    return name
