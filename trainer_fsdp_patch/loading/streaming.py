"""A quantized base under `cpu_ram_efficient_loading`: each layer leaves the accelerator as soon as it is loaded.

transformers has every rank load a quantized base whole, on its accelerator. Here the first rank of a machine keeps the
bytes in main memory, and the others keep none: FSDP or `restoring` hands them out.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from trainer_fsdp_patch.loading import moving

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

METHODS = frozenset({"bitsandbytes", "quanto", "torchao"})
"""Quantizers whose layers are done once their tensors are set.

Others lay weights out anew for their kernels after the whole base was loaded. Theirs is loaded as transformers does it.
"""

_SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"
"""transformers' variable: its threads would fill the accelerator faster than layers leave it."""

_LOADED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Layers that were loaded so, on every rank, whether their bytes are here or not."""


def is_asked(quantizer: object) -> bool:
    """Whether a model is loaded for FSDP by one rank of a machine, quantized in a way that allows it.

    Args:
        quantizer: transformers' HfQuantizer, or None.
    """
    if quantizer is None:
        return False
    from transformers.integrations import is_fsdp_enabled

    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", "")
    return str(getattr(method, "value", method)) in METHODS and bool(is_fsdp_enabled())


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """Have transformers load one tensor after the other."""
    before = os.environ.get(_SEQUENTIAL)
    os.environ[_SEQUENTIAL] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SEQUENTIAL]
        else:
            os.environ[_SEQUENTIAL] = before


def settle(model: PreTrainedModel, name: str) -> None:
    """Take a layer off the accelerator, one of whose tensors has been set.

    Args:
        model: that is being loaded.
        name: of the tensor in it; a pattern of several layers' is left alone.
    """
    if "*" in name:
        return
    layer = model.get_submodule(name.rpartition(".")[0])
    tensors = [leaf for leaf in moving.large(layer) if not leaf.tensor.is_meta]
    if moving.is_quantized(layer):
        _LOADED.add(layer)
        if not is_first():
            moving.put(layer, [leaf for leaf in tensors if not moving.is_plain(leaf, layer)], "meta")
            tensors = [leaf for leaf in tensors if moving.is_plain(leaf, layer)]
    moving.put(layer, tensors, "cpu")


def is_first() -> bool:
    """Whether this rank is the first of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def loaded(model: nn.Module) -> list[nn.Module]:
    """Layers of a model that were loaded so, and that nobody has taken over yet; the same on all ranks."""
    return [module for module in model.modules() if module in _LOADED] if _LOADED else []


def forget(layers: Iterable[nn.Module]) -> None:
    """Each rank has the bytes of these layers now, or FSDP has."""
    for layer in layers:
        _LOADED.discard(layer)


def none_loaded() -> bool:
    """Whether no layer waits to be taken over."""
    return not _LOADED
