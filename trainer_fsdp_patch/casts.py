"""VeRA's shared projections in the dtype that autocast computes in, cast once for all layers that share them.

peft slices both in each layer's forward. Autocast casts each slice again, and each of these copies lives until the
backward pass has read it. Here layers of one shape share a copy. Copies are forgotten after the model's forward and
before a step: whatever is written to the projections between shows in new ones. They are kept apart from the model, so
that no state dict, file or pickle has any.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.weak import WeakTensorKeyDictionary

LARGEST = 64
"""Copies of one tensor that are kept; the layers of a model have a few shapes."""

_PREFIXES = ("vera", "pvera")
"""Of the attributes of peft's layers that share projections A and B, and slice them."""


def watch(model: nn.Module) -> None:
    """Have the layers of a model that share projections find copies of them in their forward, under autocast.

    Args:
        model: planned, not wrapped yet.
    """
    for module in model.modules():
        if _prefix(module):
            module.register_forward_pre_hook(show)
            module.register_forward_hook(hide, always_call=True)


def _prefix(module: nn.Module) -> str:
    modules = module._modules
    return next((prefix for prefix in _PREFIXES if modules.keys() >= {f"{prefix}_A", f"{prefix}_B"}), "")


def show(module: Any, args: tuple[object, ...]) -> None:
    """Forward pre-hook of a layer: its projections are dictionaries of copies until `hide`.

    Args:
        module: peft's layer.
        args: of its forward; the first is its input, [..., in_features].
    """
    import torch

    compiling = getattr(torch.compiler, "is_compiling", lambda: False)()
    if compiling or not args or not isinstance(args[0], torch.Tensor) or autocast_dtype(args[0].device.type) is None:
        return
    if module.merged or module.disable_adapters:
        return
    prefix, device = _prefix(module), args[0].device
    first, second = (module._modules[f"{prefix}_{side}"] for side in "AB")
    held = [name for name in module.active_adapters if name in first and name in second]
    shapes = {
        name: ((len(first[name]), module.in_features), (module.out_features, second[name].shape[1])) for name in held
    }
    vars(module)[f"{prefix}_A"] = {name: corner(first[name], shape, device) for name, (shape, _) in shapes.items()}
    vars(module)[f"{prefix}_B"] = {name: corner(second[name], shape, device) for name, (_, shape) in shapes.items()}


def hide(module: nn.Module, args: object, output: object) -> None:
    """Forward hook of a layer: it has its projections again.

    Args:
        module: peft's layer.
        args: of its forward.
        output: of its forward, or None after an exception.
    """
    for prefix in _PREFIXES:
        for side in "AB":
            vars(module).pop(f"{prefix}_{side}", None)


@functools.cache
def _copies() -> WeakTensorKeyDictionary:
    """By the tensor: its version and address, and copies of its corners by shape, device and dtype."""
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


def forget() -> None:
    """Forget all copies; a graph that still needs one keeps it."""
    if _copies.cache_info().currsize:
        _copies().clear()


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast computes in now, or None where it is off.

    Args:
        device: type of the device.
    """
    import torch

    # until torch 2.4
    if not hasattr(torch.amp, "is_autocast_available"):
        on, dtype = torch.is_autocast_enabled(), torch.get_autocast_gpu_dtype()
        if device == "cpu":
            on, dtype = torch.is_autocast_cpu_enabled(), torch.get_autocast_cpu_dtype()
        return dtype if on else None
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def corner(tensor: torch.Tensor, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The first rows and columns of a tensor as autocast hands them to a matrix product.

    Args:
        tensor: shape [rows, columns].
        shape: numbers of rows and columns to take.
        device: of the product.

    Returns:
        What casting the slice gives, bits and layout; one copy for all who ask, to be read only.
    """
    import torch

    part, dtype = tensor[: shape[0], : shape[1]], autocast_dtype(device.type)
    # Autocast leaves integers and float64 alone. What trains needs a graph of its own.
    eligible = dtype is not None and part.is_floating_point() and part.dtype != torch.float64
    if not eligible or part.dtype == dtype or tensor.requires_grad or type(tensor) is not torch.Tensor:
        return part
    state = tensor._version, tensor.data_ptr()
    kept = _copies()
    before, copies = kept.get(tensor, (None, {}))  # type: ignore[no-untyped-call]
    if before != state or len(copies) >= LARGEST:
        copies = {}
        kept[tensor] = state, copies
    key = shape, device, dtype
    if key not in copies:
        copies[key] = part.to(device).to(dtype)
    copy: torch.Tensor = copies[key]
    return copy
