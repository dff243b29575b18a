"""Where in one run of bytes each tensor of a quantized layer lies."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer_fsdp_patch.bits import SIZES
from trainer_fsdp_patch.inspecting.leaves import Leaf, leaves, span

if TYPE_CHECKING:
    import torch
    from torch import nn

ALIGNED = 16
"""Each part starts at a multiple of so many bytes, so that it can be viewed in any dtype."""

SMALLEST = 64
"""Bytes below which a tensor stays as it is on each rank, such as an offset: its place would cost as much.

Parameters of plain numbers move at any size: FSDP would cast them, and refuse those without a dimension.
"""

Range = tuple[int, int, int]
"""Identity of a storage, first byte, and last byte plus one."""


@dataclass(frozen=True)
class View:
    """One tensor of a layer.

    Attributes:
        start: its first byte among those of the layer.
        shape, stride: in elements.
        dtype: as the quantizer has it.
    """

    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, stored: torch.Tensor) -> torch.Tensor:
        """The tensor as a view of the layer's bytes, or a copy where these do not start at a multiple of its size.

        FSDP1 aligns nothing in a unit with use_orig_params=False.

        Args:
            stored: uint8, one dimension.
        """
        size = self.dtype.itemsize
        reach = sum((count - 1) * step for count, step in zip(self.shape, self.stride, strict=True)) + 1
        part = stored[self.start : self.start + reach * size]
        if part.storage_offset() % size:
            part = part.clone()
        return part.view(self.dtype).as_strided(self.shape, self.stride)


def layout(layer: nn.Module, shared: Collection[Range]) -> tuple[int, dict[int, View]]:
    """How the tensors of a layer are laid out; those that other layers hold too stay as they are.

    Args:
        layer: a quantized one; tensors on meta will do.
        shared: from `shared_ranges`.

    Returns:
        Bytes of all parts, with what aligns them, and the view of each tensor that moves by its identity.
    """
    tensors = {id(leaf.tensor): leaf for leaf in leaves(layer) if is_movable(leaf, layer, shared)}
    ranges: list[tuple[int, int, int, list[Leaf]]] = []
    for leaf in sorted(tensors.values(), key=lambda leaf: span(leaf.tensor)[1:]):
        storage, start, end = span(leaf.tensor)
        # What overlaps in memory has to overlap in the layer's bytes: one may be written through the other.
        for index, (other, first, last, together) in enumerate(ranges):
            if other == storage and start < last:
                ranges[index] = other, first, max(last, end), [*together, leaf]
                break
        else:
            ranges.append((storage, start // ALIGNED * ALIGNED, end, [leaf]))
    offset, by_tensor = 0, {}
    for _, first, last, together in sorted(ranges, key=lambda item: item[3][0].path):
        for leaf in together:
            tensor = leaf.tensor
            at = offset + span(tensor)[1] - first
            by_tensor[id(tensor)] = View(at, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
        offset += -(-(last - first) // ALIGNED) * ALIGNED
    return offset, by_tensor


def is_movable(leaf: Leaf, layer: nn.Module, shared: Collection[Range]) -> bool:
    """Whether a tensor can be a view of bytes that FSDP gathers; a bias is left to FSDP.

    Scales are not, which mixed precision would cast.
    """
    import torch

    tensor = leaf.tensor
    if tensor.layout is not torch.strided or tensor.requires_grad or span(tensor) in shared:
        return False
    numbers = leaf.place.holder is layer._parameters and str(tensor.dtype).removeprefix("torch.") in SIZES
    if numbers and leaf.place.key == "bias" and type(tensor) is torch.nn.Parameter and not vars(tensor):
        return False
    _, start, end = span(tensor)
    # What repeats elements, as expanded tensors do, is smaller in memory than its elements.
    return end - start >= (1 if numbers else SMALLEST) and tensor.numel() * tensor.element_size() <= end - start


def shared_ranges(layers: Iterable[nn.Module]) -> set[Range]:
    """Memory that tensors of several layers lie in, such as bitsandbytes' tables.

    Args:
        layers: all quantized ones of a model.
    """
    users: dict[Range, int] = {}
    for layer in layers:
        for place in {span(leaf.tensor) for leaf in leaves(layer)}:
            users[place] = users.get(place, 0) + 1
    return {place for place, count in users.items() if count > 1}
