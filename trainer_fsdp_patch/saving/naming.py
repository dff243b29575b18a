"""Lets peft see a wrapped model by canonical names, which those of its state dict are."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import wrapt

from trainer_fsdp_patch.inspecting import inventory, tuning
from trainer_fsdp_patch.names import canonical
from trainer_fsdp_patch.saving import gathering
from trainer_fsdp_patch.shadowing import shadowed

if TYPE_CHECKING:
    import torch
    from torch import nn

Result = TypeVar("Result")


class CanonicalNames(wrapt.ObjectProxy):  # type: ignore[misc]
    """A model whose module, parameter and buffer names lack the segments that wrappers put in."""

    def named_modules(self, *args: object, **kwargs: object) -> Iterator[tuple[str, nn.Module]]:
        return ((canonical(name), module) for name, module in self.__wrapped__.named_modules(*args, **kwargs))

    def named_parameters(self, *args: object, **kwargs: object) -> Iterator[tuple[str, nn.Parameter]]:
        return ((canonical(name), item) for name, item in self.__wrapped__.named_parameters(*args, **kwargs))

    def named_buffers(self, *args: object, **kwargs: object) -> Iterator[tuple[str, torch.Tensor]]:
        return ((canonical(name), item) for name, item in self.__wrapped__.named_buffers(*args, **kwargs))


def with_canonical_names(model: nn.Module) -> nn.Module:
    """The model itself, or a proxy with canonical names where a wrapper sits somewhere inside it."""
    wrapped = any(canonical(name) != name for name, _ in model.named_modules())
    return CanonicalNames(model) if wrapped else model


def call_with_canonical_names(
    function: Callable[..., Result], model: nn.Module, *args: object, **kwargs: object
) -> Result:
    """Call one of peft's functions with a model whose names are those of a state dict.

    peft asks modules_to_save for their state dict and needs its names only. One rank saves, so none may gather. It runs
    prompt learners to save what they make. CPT's forward rewrites its parameter, which one rank alone must not.

    Args:
        function: takes the model first.
        model: wrapped or not.
        *args: for the function.
        **kwargs: for the function.
    """
    with contextlib.ExitStack() as stack:
        for module in gathering.own_units(model):
            stack.enter_context(shadowed(module, state_dict=functools.partial(gathering.names_of, module)))
        for encoder in tuning.prompt_encoders(tuning.by_class(model.modules())):
            stack.enter_context(_as_before(encoder))
        return function(with_canonical_names(model), *args, **kwargs)


@contextlib.contextmanager
def _as_before(module: nn.Module) -> Iterator[None]:
    """Give parameters back the memory that they had; what is written in place stays written."""
    before = [(item, item.data) for item in module.parameters() if not isinstance(item, inventory.dtensor())]
    try:
        yield
    finally:
        for parameter, data in before:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
