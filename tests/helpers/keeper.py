"""A quantizer that nobody knows: its layer keeps bytes in every way there is, and compares them when it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

FOUND: list[str] = []
"""What a layer of this process had otherwise than at first, and where."""

RUNS: list[str] = []
"""Forwards and backward passes in which a layer was compared."""

_FIRST: dict[int, dict[str, torch.Tensor]] = {}


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """Every pattern of 16 bits, those that spell NaN too."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)


class State:
    """What a quantizer keeps next to a weight."""

    def __init__(self, scales: torch.Tensor, row: torch.Tensor, more: dict[str, Any]) -> None:
        self.scales, self.row, self.more = scales, row, more


class Compared(torch.autograd.Function):
    """Hands on its input, and compares the layer's bytes in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Keeper) -> torch.Tensor:
        ctx.layer = layer
        layer.compare("forward")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.layer.compare("backward")
        return gradient, None


class Keeper(nn.Module):
    """A layer with bytes in a parameter, a buffer, an object, a dictionary, a list, and in overlapping views."""

    def __init__(self, index: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(index)
        codes = torch.randint(0, 256, (1001,), dtype=torch.uint8, generator=generator)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("columns", torch.randint(-99, 99, (7, 33), dtype=torch.int32, generator=generator).t())
        scales = patterns(torch.bfloat16)
        self.state = State(scales, scales[100:300], {"zeros": patterns(torch.float16), "few": torch.ones(3)})
        self.table = [torch.rand(40, dtype=torch.float64, generator=generator), None]
        self.moved = False
        _FIRST[id(self)] = {name: tensor.detach().clone() for name, tensor in self.held().items()}

    def held(self) -> dict[str, torch.Tensor]:
        """Everything that the layer keeps."""
        more = {"zeros": self.state.more["zeros"], "few": self.state.more["few"]}
        table = {"table": self.table[0]} if self.table[0] is not None else {"table": self.late}
        return {"codes": self.codes, "columns": self.columns, "scales": self.state.scales, "row": self.state.row} | (
            more | table
        )

    def compare(self, when: str) -> None:
        """Note what has other bits than at first, another shape or other strides."""
        RUNS.append(when)
        for name, tensor in self.held().items():
            first = _FIRST[id(self)][name]
            same = tensor.shape == first.shape and torch.equal(
                tensor.detach().contiguous().view(torch.uint8), first.contiguous().view(torch.uint8)
            )
            if not same:
                FOUND.append(f"{name} in {when}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = Compared.apply(x, self)
        if not self.moved:
            # As 8-bit layers do in their first forward.
            self.late, self.table[0], self.moved = self.table[0], None, True
        return result


class Block(nn.Module):
    """A unit: a trained layer, the keeper, and a frozen layer of plain numbers."""

    def __init__(self, index: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.frozen = nn.Linear(16, 16, dtype=dtype).requires_grad_(False)
        self.keeper = Keeper(index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # What is saved last is recomputed last, so that recomputation goes through all of it.
        return torch.tanh(self.keeper(self.frozen(x)))


class Head(nn.Linear):
    """A trained layer of fp32, whatever it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float())
