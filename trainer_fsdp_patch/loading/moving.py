"""A quantized layer's large tensors are moved or left without bytes, wherever the quantizer keeps them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch.inspecting import blanks, inventory
from trainer_fsdp_patch.inspecting.leaves import Leaf, leaves, span

if TYPE_CHECKING:
    import torch
    from torch import nn

KEPT = 1024
"""Bytes up to which a tensor stays where it is on each rank: scales of a few rows, and tables that layers share."""


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer has a parameter that is no plain floating-point one.

    Args:
        layer: of a base model; what its children have does not count.
    """
    return any(item is not None and inventory.is_quantized(item) for item in layer._parameters.values())


def large(layer: nn.Module) -> Iterator[Leaf]:
    """Places of a layer's tensors of more than `KEPT` bytes."""
    for leaf in list(leaves(layer)):
        _, start, end = span(leaf.tensor)
        if end - start > KEPT:
            yield leaf


def is_plain(leaf: Leaf, layer: nn.Module) -> bool:
    """Whether a tensor is one that FSDP shards or broadcasts by itself, such as a bias.

    Args:
        leaf: of the layer.
        layer: its owner.
    """
    import torch

    if leaf.place.holder is layer._buffers:
        return leaf.tensor.is_floating_point()
    ours = leaf.place.holder is layer._parameters and type(leaf.tensor) is torch.nn.Parameter
    return ours and not inventory.is_quantized(leaf.tensor)


def put(layer: nn.Module, items: Iterable[Leaf], device: torch.device | str) -> None:
    """Have tensors of a layer on a device, in the same places: one for each, whatever number of places it is in.

    Args:
        layer: their owner.
        items: its places; what is made of tensors moves as a whole.
        device: where their bytes go; on meta there is room for none, and from meta none come.
    """
    import torch

    device = torch.device(device)
    objects: dict[int, torch.Tensor] = {}
    for leaf in items:
        tensor = leaf.tensor
        if tensor.device == device:
            continue
        if isinstance(leaf.place.holder, torch.Tensor):
            _rebuild(layer, leaf.path.partition(".")[0], device)
            continue
        if id(tensor) not in objects:
            objects[id(tensor)] = _of_class(tensor, _moved(tensor, device))
        leaf.place.put(objects[id(tensor)])


def _rebuild(layer: nn.Module, key: str, device: torch.device) -> None:
    holders: tuple[dict[str, Any], ...] = (layer._parameters, layer._buffers, vars(layer))
    for slots in holders:
        whole = slots.get(key)
        if whole is not None and blanks.is_made(whole) and whole.device != device:
            slots[key] = blanks.rebuilt(whole, device)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor's bytes on a device, once for all who hold the same ones.

    8-bit layers have a weight under two names, and several layers may hold one table: packing looks for that.
    """
    _, start, end = span(tensor)
    made: dict[object, torch.Tensor] = _memory().setdefault(tensor.untyped_storage(), {})
    key = device, start, end, tuple(tensor.shape), tensor.stride(), tensor.dtype
    if key not in made:
        made[key] = blanks.moved(tensor, device)
    return made[key]


@functools.cache
def _memory() -> Any:
    """What was moved, by the storage that it came from, for as long as somebody holds that."""
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


def _of_class(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same object with another value, or a new one of its class where the device forbids that."""
    import torch

    if not tensor.is_meta and not value.is_meta and isinstance(tensor, torch.nn.Parameter):
        tensor.data = value
        return tensor
    return blanks.of_class(tensor, value)
