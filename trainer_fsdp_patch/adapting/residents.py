"""FSDP2 units that a run keeps gathered, or gives up again, by the memory that its steps have left.

A frozen unit that stays gathered is never out of date. A plan has to guess how much the activations take, and leaves
room for them. The first steps show what is left.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING

from trainer_fsdp_patch.measuring import footprint, memory
from trainer_fsdp_patch.planning import residence
from trainer_fsdp_patch.ranks import collectives
from trainer_fsdp_patch.sizes import size

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trainer_fsdp_patch.planning.prepared import Prepared

logger = logging.getLogger("trainer_fsdp_patch")

OFTEN, SELDOM = 64, 64
"""Memory is looked at after steps 2, 4, 8 and so on up to the first number, and each second number of steps then."""


class Residents:
    """Units of a planned model that stay gathered.

    Args:
        prepared: the model's record, under FSDP2.
        device: of the rank.

    Attributes:
        kept: those that stay gathered now, in the order in which they came.
        closed: whether a unit was given up, after which none comes again.
    """

    def __init__(self, prepared: Prepared, device: torch.device) -> None:
        self.prepared, self.device = weakref.ref(prepared), device
        self.kept: list[nn.Module] = []
        self.closed = False
        self.steps = 0

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at the memory where it is time to, and agree with all ranks on what follows."""
        prepared = self.prepared()
        stepped = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if prepared is None or prepared.known.isdisjoint(map(id, stepped)):
            return
        self.steps += 1
        often = 1 < self.steps <= OFTEN and self.steps & (self.steps - 1) == 0
        if often or self.steps % SELDOM == 0:
            self.adapt(prepared.model(), memory.least_spare(self.device))

    def adapt(self, model: nn.Module, spare: int) -> None:
        """Keep what fits, or give up what does not.

        Args:
            model: sharded by FSDP2.
            spare: bytes that no rank has used since the last time, less the margin; below zero where that was touched.
        """
        if spare < 0:
            self._give_up(-spare)
        elif not self.closed:
            self._keep(candidates(model), spare)

    def _keep(self, units: list[nn.Module], spare: int) -> None:
        units = [unit for unit in units if unit not in self.kept]
        for count in range(len(units), 0, -1):
            more = [units[place] for place in residence.spread(len(units), count)]
            if sum(map(cost, more)) <= spare:
                break
        else:
            return
        for unit in more:
            _reshard(unit, after=False)
        self.kept += more
        if collectives.is_main():
            logger.info(
                "base_budget auto: %d more units stay gathered after step %d, %s of %s that were left.",
                len(more), self.steps, size(sum(map(cost, more))), size(spare),
            )  # fmt: skip

    def _give_up(self, wanted: int) -> None:
        if self.kept and not self.closed and collectives.is_main():
            text = "base_budget auto: memory ran low at step %d: units are gathered again from now on, %d of %d first."
            logger.warning(text, self.steps, _enough(self.kept, wanted), len(self.kept))
        self._gather_again(_enough(self.kept, wanted))

    def _gather_again(self, count: int) -> None:
        self.closed = True
        for _ in range(count):
            unit = self.kept.pop()
            _reshard(unit, after=True)
            unit.reshard()  # type: ignore[operator]

    def after_error(self) -> None:
        """Give all of them up, after a step for which all ranks had no memory."""
        if self.kept and collectives.is_main():
            text = "base_budget auto: step %d ran out of memory: %d units that stayed gathered are gathered again."
            logger.warning(text, self.steps + 1, len(self.kept))
        self._gather_again(len(self.kept))


_WATCHED: weakref.WeakKeyDictionary[nn.Module, Residents] = weakref.WeakKeyDictionary()


def out_of_memory(model: nn.Module) -> None:
    """Keep no unit gathered any more, but for those that the plan replicates. All ranks call this alike.

    Args:
        model: planned, between two steps.
    """
    if model in _WATCHED:
        _WATCHED[model].after_error()


def watch(prepared: Prepared, device: torch.device) -> Residents:
    """Adapt after optimizer steps from now on, for as long as the model lives.

    Args:
        prepared: record of a model that FSDP2 is about to take.
        device: of the rank.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    residents = _WATCHED[prepared.model()] = Residents(prepared, device)

    def after(optimizer: torch.optim.Optimizer, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        residents.after_step(optimizer)

    weakref.finalize(prepared.model(), register_optimizer_step_post_hook(after).remove)
    return residents


def candidates(model: nn.Module) -> list[nn.Module]:
    """Frozen units that FSDP2 gathers twice a step; what stays gathered by a user's setting is none."""
    # until torch 2.8: there is no switch for one unit alone
    return [
        module
        for module in model.modules()
        if module is not model and hasattr(module, "set_reshard_after_forward") and _is_frozen(module)
    ]


def _is_frozen(module: nn.Module) -> bool:
    groups = footprint.groups(module)
    frees = all(getattr(group, "post_forward_mesh_info", None) is not None for group in groups)
    frozen = not any(item.sharded_param.requires_grad for group in groups for item in group.fsdp_params)
    return bool(groups) and frees and frozen


def cost(unit: nn.Module) -> int:
    """Bytes of a unit while it is gathered, once it has been."""
    groups = footprint.groups(unit)
    outputs = (tensor for group in groups for item in group.fsdp_params for tensor in item.all_gather_outputs)
    return sum(tensor.numel() * tensor.element_size() for tensor in outputs)


def _enough(kept: list[nn.Module], wanted: int) -> int:
    """How many of the last units free so many bytes, all where these are too few."""
    freed = 0
    for count, unit in enumerate(reversed(kept), 1):
        freed += cost(unit)
        if freed >= wanted:
            return count
    return len(kept)


def _reshard(unit: nn.Module, *, after: bool) -> None:
    for name in ("set_reshard_after_forward", "set_reshard_after_backward"):
        getattr(unit, name)(after, recurse=False)
