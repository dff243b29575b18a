"""A full state dict has a quantized layer as its quantizer saves it, and not as FSDP holds it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from trainer_fsdp_patch.names import PACKED, canonical
from trainer_fsdp_patch.packing.packed import Packed, packed_layers
from trainer_fsdp_patch.shadowing import shadowed

if TYPE_CHECKING:
    import torch
    from torch import nn

    Tensors = dict[str, torch.Tensor]


def as_saved(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The same state dict, with each packed layer under the keys that its quantizer gives it.

    Args:
        model: unwrapped or not.
        tensors: full, by name, on any device; what is no part of a packed layer stays as it is.

    Returns:
        Copies for the packed layers, in the place of the first of their keys.
    """
    layers = {item.name: item for item in packed_layers(model)}
    result: Tensors = {}
    for name, tensor in tensors.items():
        prefix, _, key = canonical(name).rpartition(".")
        if key == PACKED and prefix in layers:
            result.update(_saved(layers[prefix], tensor, name[: -len(PACKED)]))
        elif prefix not in layers or f"{name.removesuffix(key)}{PACKED}" not in tensors:
            result[name] = tensor
    return result


def _saved(layer: Packed, stored: torch.Tensor, prefix: str) -> Tensors:
    """What the quantizer's own class saves of a layer.

    Args:
        layer: packed.
        stored: its bytes, in any dtype.
        prefix: of its keys.
    """
    import torch

    module = layer.layer
    saved: Tensors = {}
    # FSDP2 has hooks on each module of a unit that shard it before it is saved.
    alone = shadowed(module, _state_dict_pre_hooks=OrderedDict(), _state_dict_hooks=OrderedDict())
    with layer.reading(stored.detach().reshape(-1).view(torch.uint8)), layer.as_before(), alone:
        type(module).state_dict(module, destination=saved, prefix=prefix, keep_vars=False)
        return {key: _copy(value) for key, value in saved.items()}


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clone() if hasattr(value, "detach") else value
