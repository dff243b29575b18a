"""The bytes of tensors: compared, and summed up in two numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element of each floating dtype that FSDP takes, by name."""


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in one dimension: uint8, aligned so that they can be viewed in larger words."""
    import torch

    stored = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return stored.clone() if stored.storage_offset() % 8 else stored


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes, NaNs included.

    Args:
        one: any dtype and device.
        other: on the same device.
    """
    import torch

    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pair = bits(one), bits(other)
    # torch compares words four times faster than bytes.
    words = len(pair[0]) // 8 * 8
    first, second = (stored[:words].view(torch.int64) for stored in pair)
    return bool(first.equal(second) and pair[0][words:].equal(pair[1][words:]))


_ROW = 256
"""Words of 8 bytes in a row of a fingerprint's table."""


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Two sums over the bits of a tensor, int64, shape [2]. Weights are the place in a row, and the row.

    Each is one pass at the speed of memory; both have to collide for a difference to stay unseen.
    """
    import torch

    stored = bits(tensor)
    # Weights are odd: modulo 2**64 no odd number takes a difference to zero, so one changed word always shows.
    device, rows = tensor.device, len(stored) // (8 * _ROW) * 8 * _ROW
    table, rest = stored[:rows].view(torch.int64).view(-1, _ROW), stored[rows:]
    places = torch.arange(1, 2 * max(len(table), _ROW, len(rest)), 2, device=device)
    end = (rest * places[: len(rest)]).sum()
    # Sums wrap around. The rest counts in both, at weights of its own.
    columns, lines = _mixed(table.sum(0)), _mixed(table.sum(1))
    return torch.stack([(columns * places[:_ROW]).sum() + end, (lines * places[: len(table)]).sum() + 3 * end])


def _mixed(sums: torch.Tensor) -> torch.Tensor:
    """Sums whose top bit shows in a lower one too: modulo 2**64 every odd weight takes a change of it to the same.

    Without this two changed signs of fp32 cancel each other.
    """
    return sums ^ ((sums >> 32) & 0xFFFFFFFF)
