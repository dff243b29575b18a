"""Quantized parameters whose bytes are elsewhere: of their own class by name, on meta, and copied as what they are."""

from __future__ import annotations

import copy
import functools
import types
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch
    from torch import nn

_KIND = "_trainer_fsdp_patch_kind"
"""Attribute of a class of parameters without bytes: the quantizer's own class."""


def of_class(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A tensor that is to another what its quantizer makes of it, and shares what is written on it.

    Args:
        tensor: plain, or a parameter of a quantizer's class; one on meta will do.
        value: plain, of any device; on meta the result is blank.
    """
    import torch

    if type(tensor) is torch.Tensor and not vars(tensor):
        return value
    kind = getattr(tensor, _KIND, type(tensor))
    made: torch.Tensor = torch.Tensor._make_subclass(_blank(kind) if value.is_meta else kind, value)
    made.requires_grad_(tensor.requires_grad)
    made.__dict__ = vars(tensor)
    return made


def rebuilt(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor that is made of tensors, of others on a device: with their bytes, or room for them where there are none.

    It says that it is on the device of its parts, and torch refuses one whose parts have gone elsewhere.

    Args:
        tensor: a traceable wrapper subclass, or a parameter of one.
        device: where the parts go.
    """
    import torch

    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = {name: getattr(tensor, name) for name in names}
    parts = {name: rebuilt(part, device) if is_made(part) else moved(part, device) for name, part in parts.items()}
    kind: Any = type(tensor)
    made: torch.Tensor = kind.__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
    if isinstance(tensor, torch.nn.Parameter):
        made = torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
    for key, value in vars(tensor).items():
        vars(made).setdefault(key, value)
    return made


def bring(layer: nn.Module, device: torch.device) -> bool:
    """Have what is made of tensors say that it is where its layer runs, as its parts will be.

    Args:
        layer: whose bytes may be elsewhere.
        device: where it runs.

    Returns:
        Whether anything was elsewhere.
    """
    away = {
        key: value
        for key, value in layer._parameters.items()
        if value is not None and is_made(value) and value.device != device
    }
    for key, value in away.items():
        layer._parameters[key] = cast("nn.Parameter", rebuilt(value, device))
    return bool(away)


def is_made(tensor: object) -> bool:
    """Whether a tensor is made of tensors."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return bool(is_traceable_wrapper_subclass(tensor))


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor's bytes on a device, with its strides; room for them where it is on meta.

    Args:
        tensor: plain.
        device: where; on meta there is no room.
    """
    import torch

    room = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return room if room.is_meta or tensor.is_meta else room.copy_(tensor.detach())


@functools.cache
def _blank(kind: Any) -> Any:
    """A class of parameters whose copies are without bytes too.

    peft copies a layer to take it to pieces, as for DoRA, and quantizers' own copies go by way of `data`.
    """

    def copied(self: torch.Tensor, memo: dict[int, object]) -> torch.Tensor:
        import torch

        made: torch.Tensor = torch.Tensor._make_subclass(type(self), self.data.clone(), self.requires_grad)
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(vars(self), memo)
        return made

    # Packages know bitsandbytes' weights by the name of their class.
    body = {"__deepcopy__": copied, _KIND: kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return types.new_class(kind.__name__, (kind,), exec_body=lambda space: space.update(body))
