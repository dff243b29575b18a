"""Whether training moves an adapter at all: a save warns of one that equals its start."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from trainer_fsdp_patch import bits
from trainer_fsdp_patch.errors import warn
from trainer_fsdp_patch.planning.prepared import Prepared

if TYPE_CHECKING:
    import torch

_LIVENESS: weakref.WeakKeyDictionary[Prepared, Liveness] = weakref.WeakKeyDictionary()


class Liveness:
    """What an adapter was at the start, and whether steps have been taken that should have changed it.

    Args:
        tensors: the trainable ones, as every rank starts with them.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = list(tensors)
        self.start = [bits.fingerprint(tensor) for tensor in self.tensors]
        self.known = {id(tensor) for tensor in self.tensors}
        self.steps, self.moved = 0, False
        self.largest: torch.Tensor | None = None

    def note_gradients(self, averages: torch.Tensor) -> None:
        """Keep the largest gradient so far; it stays on its device, so nothing waits for it.

        Args:
            averages: gradients of any parameters, flat.
        """
        import torch

        # This runs at each step until a save has found that the adapter moves.
        if self.moved or not averages.numel():
            return
        largest = torch.linalg.vector_norm(averages, float("inf")).float()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count a step that has a learning rate; where the optimizer has none of the adapter, any of its rates."""
        groups = optimizer.param_groups
        ours = [group for group in groups if not self.known.isdisjoint(map(id, group["params"]))]
        self.steps += any(_moves(group["lr"]) for group in ours or groups)

    def warn_unmoved(self) -> None:
        """Warn of an adapter that steps with gradients have left as it was, bit for bit.

        One process saves such a run: in bf16 the first small steps of a warm-up round to nothing.
        """
        # Negated, for NaN is above nothing.
        if self.moved or not self.steps or self.largest is None or not float(self.largest) > 0:
            return
        self.moved = _differ(self.start, self.tensors)
        if not self.moved:
            warn(
                "adapter",
                f"all of its {len(self.tensors)} trainable tensors are what they were before {self.steps} steps "
                "with gradients",
                "It is written as it is, an adapter without effect so far",
                "Check that the optimizer holds its parameters, and that the learning rate is not too small for "
                "their dtype",
            )


def watch(prepared: Prepared) -> None:
    """Remember what the trainable tensors of a planned model are now."""
    _LIVENESS[prepared] = Liveness([tensor for tensor in prepared.tensors if tensor.requires_grad])


def of(prepared: Prepared) -> Liveness:
    """What is remembered; from `watch` on."""
    return _LIVENESS[prepared]


def _moves(rate: float | torch.Tensor) -> bool:
    return not isinstance(rate, (int, float)) or rate != 0


def _differ(start: Iterable[torch.Tensor], tensors: Iterable[torch.Tensor]) -> bool:
    return any(not before.equal(bits.fingerprint(tensor)) for before, tensor in zip(start, tensors, strict=True))
