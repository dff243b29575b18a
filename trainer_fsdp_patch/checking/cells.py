"""The runs of `check`: what comes before them, and one set-up in one process, stock and patched."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer_fsdp_patch import devices
from trainer_fsdp_patch.checking.errors import CheckError
from trainer_fsdp_patch.checking.setups import Method
from trainer_fsdp_patch.measuring.footprint import Footprint
from trainer_fsdp_patch.patching import registry
from trainer_fsdp_patch.patching.awaiting import DISABLE
from trainer_fsdp_patch.testing import beyond, case, forks, trial
from trainer_fsdp_patch.testing.case import Outcome, Setup

LONGEST = 60.0
"""Seconds after which a run counts as hung, where each rank has a core."""

SIDES = ("one", "stock", "patched")
"""Runs of a set-up, by the names of their folders; the first is one process."""


class OutOfTime(Exception):  # noqa: N818
    """The time for everything is over; it ends the runs and is no error of theirs."""


@dataclass(frozen=True)
class Machine:
    """What is found before the first cell.

    Attributes:
        base: folder of the base model.
        devices: name of each rank's accelerator; none for ranks on the CPU.
        aside: why a patch that concerns what is installed is not in place, by its name.
        off: patches that the environment switches off.
    """

    base: str
    devices: list[str]
    aside: dict[str, str]
    off: list[str]


@dataclass(frozen=True)
class Side:
    """A run on ranks: "" or what is wrong with it, its seconds, and what it took of rank 0 where it came to a step."""

    error: str
    seconds: float
    footprint: Footprint | None


@dataclass(frozen=True)
class Cell:
    """A set-up, stock and patched.

    Attributes:
        name: of the set-up.
        stock, patched: the runs on ranks.
        worst: the largest relative error of the patched run, or NaN.
        seconds: of all runs, that of one process too.
    """

    name: str
    stock: Side
    patched: Side
    worst: float
    seconds: float

    @property
    def right(self) -> bool:
        return not self.patched.error


class Clock:
    """What is left of the time for everything.

    Args:
        seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def limit(self, ranks: int) -> None:
        """Have the next launch end with the time that is left, or where it hangs.

        Args:
            ranks: number of them. Ranks that share a core are slower.

        Raises:
            OutOfTime: nothing is left.
        """
        if self.left <= 0:
            raise OutOfTime
        forks.TIMEOUT = min(self.left, LONGEST * max(1.0, ranks / cores()))


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def begin(folder: Path, ranks: int, clock: Clock) -> Machine:
    """Write the base model, and ask forked ranks what the parent must not ask, or it could fork none after.

    Args:
        folder: for the base.
        ranks: number of ranks.
        clock: of everything.

    Raises:
        CheckError: a rank has failed, with its own error.
        OutOfTime: the time is over.
    """
    clock.limit(ranks)
    outcomes = forks.launch(_begin, str(folder), ranks=ranks if forks.on_accelerators(ranks) else 1)
    for rank, outcome in enumerate(outcomes):
        if outcome.error and clock.left <= 0:
            raise OutOfTime
        if outcome.error:
            found = f"{outcome.error} on rank {rank}, before any training"
            raise CheckError("check", found, "No set-up was trained", "Mend this first; no patch was in place")
    first = outcomes[0]
    found_aside, off = (first.extra[name] for name in ("aside", "off"))
    assert isinstance(found_aside, dict)
    assert isinstance(off, list)
    names = [str(outcome.extra["device"]) for outcome in outcomes if outcome.extra["device"]]
    return Machine(first.folder, names, found_aside, off)


def _begin(folder: str, rank: int) -> Outcome:
    import trainer_fsdp_patch

    kind = devices.kind()
    device = "" if kind == "cpu" else devices.described(devices.module(kind), rank).name
    outcome = Outcome(extra={"device": device})
    if rank > 0:
        return outcome
    outcome.folder = trial.tiny_base(Path(folder))
    states = list(trainer_fsdp_patch.patch())
    waiting = (registry.FAILED, registry.WAITING)
    outcome.extra["aside"] = {item.name: item.reason for item in states if item.state in waiting}
    outcome.extra["off"] = [item.name for item in states if item.state == registry.SKIPPED and DISABLE in item.reason]
    return outcome


def leave_aside(aside: dict[str, str]) -> None:
    """Have patched ranks leave patches out that do not fit; each rank patches strictly, and would refuse to train.

    Args:
        aside: names of the patches, with the reasons.
    """
    before = os.environ.get(DISABLE, "")
    os.environ[DISABLE] = ",".join(filter(None, (before, *aside)))


def run(setup: Setup, method: Method, base: str, folder: Path, clock: Clock, began: Callable[[str], object]) -> Cell:
    """Train a set-up in one process, stock on ranks and patched on ranks, and compare.

    A patched cell has to equal one process. It may take no more of a rank than its plan says and than stock does.

    Args:
        setup: with the number of ranks.
        method: puts the adapter on.
        base: folder of the base model.
        folder: for adapters and logs, in a folder for each of `SIDES`.
        clock: of everything.
        began: told the name of each run as it begins.

    Raises:
        OutOfTime: the time was over before all runs had ended.
    """
    outcomes: dict[str, Outcome] = {}
    seconds: dict[str, float] = {}
    for side in SIDES:
        began(side)
        start = time.monotonic()
        outcomes[side] = _run(setup, method, base, folder / side, clock)
        seconds[side] = time.monotonic() - start
        if outcomes[side].error and clock.left <= 0:
            raise OutOfTime
        if side == "one" and outcomes[side].error:
            error = f"one process fails, and there is nothing to compare with: {outcomes[side].error}"
            nothing = Side(error, 0.0, None)
            return Cell(setup.name, nothing, nothing, float("nan"), seconds[side])
    stock, patched = (case.compare(outcomes[side], outcomes["one"], setup) for side in SIDES[1:])
    took = [outcomes[side].footprint for side in SIDES[1:]]
    more = beyond.fault(took[1], None, took[0]) if took[1] else ""
    return Cell(
        setup.name,
        Side(stock.error, seconds["stock"], took[0]),
        Side(patched.error or more, seconds["patched"], took[1]),
        patched.worst,
        sum(seconds.values()),
    )


def _run(setup: Setup, method: Method, base: str, folder: Path, clock: Clock) -> Outcome:
    """One run; what its ranks wrote is next to its adapter."""
    ranks = 1 if folder.name == "one" else setup.ranks
    clock.limit(ranks)
    outcome = trial.run(setup, method, base, folder, ranks=ranks, patched=folder.name == "patched")
    for rank, text in enumerate(outcome.logs):
        (folder / f"rank{rank}.log").write_text(text)
    if "traceback" in outcome.extra:
        (folder / "error.txt").write_text(str(outcome.extra["traceback"]))
    return outcome
