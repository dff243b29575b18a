"""Which units of the frozen base stay full on each rank: what a user asks for, the rule, and what it buys."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from trainer_fsdp_patch.errors import PlanError
from trainer_fsdp_patch.inspecting import units
from trainer_fsdp_patch.inspecting.inventory import ADAPTER, BASE, QUANTIZED, TensorInfo
from trainer_fsdp_patch.measuring import memory
from trainer_fsdp_patch.planning import expecting
from trainer_fsdp_patch.sizes import size

if TYPE_CHECKING:
    from torch import nn

    from trainer_fsdp_patch.inspecting.walk import Walk
    from trainer_fsdp_patch.planning.plan import Plan

    Budget = int | str | None

ENVIRONMENT = "TRAINER_FSDP_PATCH_BASE_BUDGET"
"""Environment variable: a budget where `patch()` was given none."""

AUTO = "auto"
REASON = "base_budget keeps its unit full on each rank"

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{kind}b": base**power
    for power, letter in enumerate("kmgt", 1)
    for kind, base in (("", 1000), ("i", 1024))
}
"""Bytes of each unit that a text may have, in lower case."""


def asked(given: Budget, setting: Budget) -> Budget:
    """The budget that holds: that of a call, of `patch()`, or of the environment.

    Raises:
        PlanError: it is none.
    """
    first = next((value for value in (given, setting) if value is not None), os.environ.get(ENVIRONMENT) or None)
    check(first)
    return first


def check(value: Budget) -> None:
    """Refuse what is no budget.

    Args:
        value: bytes, a text of bytes such as "8GiB", a share such as "25%", "auto", or None.

    Raises:
        PlanError: it is none of these.
    """
    if value is not None and value != AUTO:
        limit(value, 0)


def limit(value: int | str, total: int) -> int:
    """Bytes of a budget.

    Args:
        value: bytes, a text of bytes, or a share in percent.
        total: bytes that 100 % are.

    Raises:
        PlanError: it is none of these.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-z]*)\s*", value.lower()) if isinstance(value, str) else None
    if found is None:
        _refuse(value)
    number, unit = float(found[1]), found[2]
    if unit == "%" and number <= 100:
        return int(total * number / 100)
    if unit not in _UNITS:
        _refuse(value)
    return int(number * _UNITS[unit])


def _refuse(value: object) -> NoReturn:
    raise PlanError(
        "base_budget",
        repr(value),
        "No plan was made",
        'Give bytes, such as 8 * 2**30 or "8GiB", a share of the base up to "100%", or "auto"',
        setting="base_budget",
    )


def spread(count: int, kept: int) -> list[int]:
    """Places of layers that lie evenly among all: FSDP gathers the next one while a resident layer computes."""
    return [(2 * index + 1) * count // (2 * kept) for index in range(kept)]


class Base(NamedTuple):
    """The frozen base of a plan.

    Attributes:
        model: before FSDP takes it; walked: its modules.
        names: all names of each parameter, by the first.
        layers: names of the modules that become units, the root aside.
        originals: the tensors of each layer that is packed, by the name of its packed parameter.
    """

    model: nn.Module
    walked: Walk
    names: Mapping[str, Collection[str]]
    layers: list[str]
    originals: Mapping[str, tuple[TensorInfo, ...]]

    def units(self, tensors: Iterable[str], fsdp_version: int) -> expecting.Units:
        """The units of some of its parameters."""
        held = {name: self.names.get(name, (name,)) for name in tensors}
        cut = expecting.units(self.model, self.walked, held, self.layers, fsdp_version)
        return (("", tuple(held)),) if cut is None else cut


def budgeted(
    plan: Plan,
    base: Base,
    wanted: int | str,
    ranks: int,
    gathers: int,
    room: memory.Room | None = None,
) -> Plan:
    """The plan with as many units full on each rank as fit a budget, and a sentence of what that buys.

    Args:
        plan: without a budget.
        base: of the model.
        wanted: the budget.
        ranks: that share one copy of the base.
        gathers: how often a step gathers a layer.
        room: what each rank has room for; None asks this process's device where the budget is "auto".

    Raises:
        PlanError: the budget is none.
    """
    from trainer_fsdp_patch.planning.plan import REPLICATE, SHARD

    if ranks == 1:
        return _with(plan, f"base_budget {wanted} is without effect: FSDP does not split the base here")
    text = str(wanted)
    if wanted == AUTO:
        wanted = automatic(plan, room or memory.room(base.model), ranks)
        text += f" ({size(wanted)})"
    sharded = {item.tensor.name: item.tensor for item in plan.placements if item.placement == SHARD}
    sharded = {name: tensor for name, tensor in sharded.items() if tensor.kind == "parameter"}
    frozen = {name: tensor for name, tensor in sharded.items() if tensor.role in (BASE, QUANTIZED)}
    cut = base.units(frozen, plan.fsdp_version)
    costs = {home: _extra([frozen[name] for name in names], ranks) for home, names in cut if names}
    most = limit(wanted, sum(costs.values()))
    chosen = _choose(costs, base.layers, most)
    cast = [(home, names) for home, names in cut if any(frozen[name].dtype != plan.param_dtype for name in names)]
    if plan.param_dtype is not None and cast and len(chosen) < len(costs):
        # They would begin in their own dtype. FSDP1's units cast nothing that they are given, and FSDP2's not all.
        named = {home: [every for name in names for every in base.names.get(name, (name,))] for home, names in cast}
        first = units.beginnings(base.walked, base.layers, named)
        chosen = _choose({home: cost for home, cost in costs.items() if home not in first}, base.layers, most)
    resident = tuple((home, names) for home, names in cut if home in chosen)
    full = {name for _, names in resident for name in names}
    placements = []
    for item in plan.placements:
        name = item.tensor.name
        # A layer that stays full has nothing to gain from being packed.
        kinds = base.originals.get(name, (item.tensor,)) if name in full else ()
        placements += [dataclasses.replace(item, tensor=tensor, placement=REPLICATE, reason=REASON) for tensor in kinds]
        placements += [] if kinds else [item]
    left = [name for name in sharded if name not in full]
    rest = None if plan.units is None else base.units(left, plan.fsdp_version)
    kept = dataclasses.replace(plan, placements=tuple(placements), units=rest, resident=resident)
    cost = sum(costs[home] for home in chosen)
    head = f"base_budget {text}: {len(chosen)} of {len(costs)} units stay full on each rank"
    text = f"{head}, which costs it {size(cost)} beyond their shards"
    twice = expecting.gathered_twice(base.model, base.walked, base.layers, plan.fsdp_version)
    return _with(kept, text + _bought(plan, kept, twice, ranks, gathers))


def automatic(plan: Plan, room: memory.Room, ranks: int) -> int:
    """Bytes that are left for the base next to all else that a rank holds in a step.

    These are shards and replicas, units while they are gathered, gradients and optimizer states, and activations.
    Where units do not go by class, all of the base counts as gathered at once.

    Args:
        plan: without a budget.
        room: of the rank that has the least.
        ranks: that share one copy of the base.
    """
    from trainer_fsdp_patch.planning import budget
    from trainer_fsdp_patch.planning.plan import SHARD

    taken = expecting.footprint(plan, ranks)
    gathered = plan.nbytes(SHARD) if taken.gathered is None else taken.gathered
    trained = (item for item in plan.placements if item.tensor.role == ADAPTER)
    states = ((budget.cost(item.tensor) - item.tensor.nbytes, item.placement) for item in trained)
    stepped = sum(size // ranks if placement == SHARD else size for size, placement in states)
    return max(0, room.usable - taken.rest - gathered - stepped)


def _with(plan: Plan, reason: str) -> Plan:
    return dataclasses.replace(plan, reasons=(*plan.reasons, reason))


def _extra(tensors: Iterable[TensorInfo], ranks: int) -> int:
    """Bytes that a rank holds beyond its shard of what it keeps full."""
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return nbytes - nbytes // ranks


def _bought(before: Plan, after: Plan, twice: set[str], ranks: int, gathers: int) -> str:
    """End of a sentence: what a step gathers with the budget and without; "" where units do not go by class."""
    if before.units is None or after.units is None:
        return ""
    (most, many), (fewest, few) = (expecting.traffic(plan, twice, ranks, gathers) for plan in (before, after))
    return f"; a step gathers {fewest} instead of {most} times, and {size(few)} of {size(many)}"


def _choose(costs: dict[str, int], layers: list[str], budget: int) -> list[str]:
    """Names of units that fit the budget together."""
    twice = [home for home in layers if home in costs]
    chosen: list[str] = []
    for count in range(len(twice), 0, -1):
        some = [twice[place] for place in spread(len(twice), count)]
        if sum(costs[home] for home in some) <= budget:
            chosen = some
            break
    left = budget - sum(costs[home] for home in chosen)
    # Layers differ in size. What is left may hold a smaller one, or what is gathered once.
    for home in sorted(costs.keys() - set(chosen), key=lambda home: (home not in layers, costs[home], home)):
        if costs[home] <= left:
            chosen.append(home)
            left -= costs[home]
    return chosen
