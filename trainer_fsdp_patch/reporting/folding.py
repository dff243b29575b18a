"""Units of a plan as a reader wants them: those that are alike together, with what is in them and why."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from trainer_fsdp_patch.planning import expecting
from trainer_fsdp_patch.planning.plan import Plan
from trainer_fsdp_patch.sizes import size

_RUNS = 3
"""Ranges of layers that are named one by one."""


class Row(NamedTuple):
    """Tensors of a unit that go the same way.

    Attributes:
        role, placement, reason: as the plan has them.
        tensors: how many; nbytes: of all of them, in full.
    """

    role: str
    placement: str
    reason: str
    tensors: int
    nbytes: int

    @property
    def counted(self) -> str:
        """How many tensors, in words."""
        return f"{self.tensors} tensor{'' if self.tensors == 1 else 's'}"


class Group(NamedTuple):
    """Units that are alike.

    Attributes:
        name: of all of them, such as "model.layers.0-79".
        times: how many.
        rows: of one of them.
        resident: whether base_budget keeps them full.
    """

    name: str
    times: int
    rows: tuple[Row, ...]
    resident: bool

    @property
    def nbytes(self) -> int:
        """Bytes of one of them, in full."""
        return sum(row.nbytes for row in self.rows)

    @property
    def taken(self) -> str:
        """The bytes of one of them, in words, and whether they are full."""
        each = " each" if self.times > 1 else ""
        return f"{size(self.nbytes)}{each}{', full on each rank' if self.resident else ''}"


def groups(plan: Plan) -> list[Group]:
    """The units of a plan, the root first, those that are alike together.

    Args:
        plan: of a model.
    """
    homes = {tensor: home for home, held in (*(plan.units or ()), *plan.resident) for tensor in held}
    resident = {home for home, _ in plan.resident}
    known = set(homes.values()) | {home for home, _ in plan.units or ()}
    found: dict[str, Counter[tuple[str, str, str]]] = {}
    sizes: Counter[tuple[str, tuple[str, str, str]]] = Counter()
    for item in plan.placements:
        tensor = item.tensor
        home = homes.get(tensor.name, expecting.nearest(tensor.name, known))
        # Some reasons name the unit, which must not keep those that are alike apart.
        reason = re.sub(rf" {re.escape(home)}(?![\w.])", "", item.reason) if home else item.reason
        key = (tensor.role, item.placement, reason)
        found.setdefault(home, Counter())[key] += 1
        sizes[home, key] += tensor.nbytes
    alike: dict[tuple[object, ...], list[str]] = {}
    for home, counts in found.items():
        rows = tuple(Row(*key, count, sizes[home, key]) for key, count in sorted(counts.items()))
        alike.setdefault((re.sub(r"\d+", "#", home), rows, home in resident), []).append(home)
    # A root without a name is the first, wherever its first tensor stands.
    ordered = sorted(alike.items(), key=lambda item: item[1][0] != "")
    return [Group(_together(names), len(names), rows, kept) for (_, rows, kept), names in ordered]  # type: ignore[arg-type]


def _together(names: list[str]) -> str:
    """One name for some that differ in numbers: "layers.0-3,5", or the ends of what would be a long list."""
    if len(names) == 1:
        return names[0]
    numbers = [re.findall(r"\d+", name) for name in names]
    columns = [_ranges(sorted({int(row[place]) for row in numbers})) for place in range(len(numbers[0]))]
    parts = iter(columns)
    return re.sub(r"\d+", lambda _: next(parts), names[0])


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][-1:] = [runs[-1][-1], number] if len(runs[-1]) == 1 else [number]
        else:
            runs.append([number])
    if len(runs) > _RUNS:
        return f"{numbers[0]}..{numbers[-1]}"
    return ",".join("-".join(map(str, run)) for run in runs)
