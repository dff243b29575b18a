"""The texts of `check`: its first lines, a line and a row for each cell, its last line, and JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer_fsdp_patch import devices, versions
from trainer_fsdp_patch.checking.cells import Cell, Machine, Side, cores
from trainer_fsdp_patch.checking.options import Options
from trainer_fsdp_patch.checking.setups import BASES, METHODS

if TYPE_CHECKING:
    from rich.table import Table

    from trainer_fsdp_patch.testing.case import Setup

START, SECONDS = 10, 3
"""What the imports take, and a set-up where each rank has a core of its own."""

PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")


def installed() -> dict[str, str]:
    """Versions of the packages that matter, of those that are installed."""
    return {name: str(version) for name in PACKAGES if (version := versions.installed(name)) is not None}


def on_releases() -> list[str]:
    """The lines that need no import: versions, and which of them nobody has tested."""
    lines = [", ".join(f"{name} {version}" for name, version in installed().items())]
    for package, version in versions.untested().items():
        newest = versions.NEWEST_TESTED[package]
        lines.append(f"untested: {package} {version}, newest tested {newest}; the cells judge it")
    return lines


def on_runs(options: Options, setups: Sequence[Setup], ranks: int, machine: Machine) -> list[str]:
    """The lines before the first cell: ranks and devices, patches that are not in place, what is compared, how long.

    Args:
        options: as asked for.
        setups: to be trained.
        ranks: number of them.
        machine: what was found.
    """
    where = f"on the CPU ({cores()} cores), by gloo"
    if machine.devices:
        where = f"on {', '.join(machine.devices)}, by {devices.backend(devices.kind())}"
    elif devices.count():
        where += f"; {ranks} ranks need as many accelerators, and {devices.count()} found"
    lines = [f"{ranks} ranks {where}"]
    lines += [f"stands aside: {name}: {reason}" for name, reason in machine.aside.items()]
    lines += [f"switched off: {', '.join(machine.off)}"] if machine.off else []
    left_out = [setup.name for setup in options.setups if setup.name not in {item.name for item in setups}]
    if left_out:
        lines.append(f"left out, for the installed releases train no FSDP2 on these devices: {'; '.join(left_out)}")
    lines.append(f"{_subject(options)} in {len(setups)} set-ups, stock and patched, each compared with one process:")
    lines.append("losses, gradient norms and every adapter tensor of each step, and what a rank holds and gathers")
    expected = START + SECONDS * len(setups) * (1 if machine.devices else max(1.0, ranks / cores()))
    return [*lines, f"about {expected:.0f} s; it ends after {options.timeout:.0f} s at the latest"]


def _subject(options: Options) -> str:
    """The method, and the base where that is quantized."""
    return f"{METHODS[options.method].title}{BASES[options.quantize].title}"


def line(cell: Cell) -> str:
    """A cell that has ended, in one line.

    Args:
        cell: the set-up.
    """
    return f"{cell.name}: {cell.patched.error or 'right'} ({cell.seconds:.1f} s; stock: {cell.stock.error or 'right'})"


def table(options: Options, cells: Sequence[Cell], ranks: int) -> Table:
    """Every cell: verdicts, the largest error of the patched run, units and gathered bytes of both.

    Args:
        options: as asked for.
        cells: that have ended.
        ranks: number of them.
    """
    from rich.table import Table

    made = Table(title=f"{_subject(options)} on {ranks} ranks next to one process", title_justify="left")
    for column in ("set-up", "stock", "patched", "relative error", "units", "bytes gathered at once"):
        made.add_column(column, overflow="fold")
    for cell in cells:
        said = (cell.stock.error or "right", cell.patched.error or "right", f"{cell.worst:.1e}")
        made.add_row(cell.name, *said, _both(cell, "units"), _both(cell, "gathered"))
    return made


def _both(cell: Cell, name: str) -> str:
    """A number of stock's and of the patched run; a run that ends before its first step has none."""
    sides = (cell.stock.footprint, cell.patched.footprint)
    return " -> ".join("none" if item is None else str(getattr(item, name)) for item in sides)


def verdict(options: Options, cells: Sequence[Cell], setups: Sequence[Setup]) -> str:
    """The last line: how many cells are right, on which untested releases, and what was not run.

    Args:
        options: as asked for.
        cells: that have ended.
        setups: all that were to be trained.
    """
    untested = versions.untested()
    said = f"{sum(cell.right for cell in cells)} of {len(setups)} right"
    said += f" on untested releases: {', '.join(' '.join(pair) for pair in untested.items())}" if untested else ""
    missing = not_run(cells, setups)
    return f"{said}; not run within {options.timeout:g} s: {'; '.join(missing)}" if missing else said


def not_run(cells: Sequence[Cell], setups: Sequence[Setup]) -> list[str]:
    """Names of the set-ups that have no cell.

    Args:
        cells: that have ended.
        setups: all that were to be trained.
    """
    return [setup.name for setup in setups if setup.name not in {cell.name for cell in cells}]


def as_json(
    options: Options, cells: Sequence[Cell], setups: Sequence[Setup], ranks: int, machine: Machine | None
) -> dict[str, object]:
    """What a program reads: versions, ranks, patches that are not in place, cells, and the last line.

    Args:
        options: as asked for.
        cells: that have ended.
        setups: all that were to be trained.
        ranks: number of them.
        machine: what was found, None where the time was over before.
    """
    return {
        "installed": installed(),
        "untested": versions.untested(),
        "ranks": ranks,
        "devices": machine.devices if machine else [],
        "aside": machine.aside if machine else {},
        "off": machine.off if machine else [],
        "method": options.method,
        "quantize": options.quantize,
        "cells": [
            {
                "set-up": cell.name,
                "right": cell.right,
                "seconds": round(cell.seconds, 2),
                # JSON has no NaN.
                "relative error": cell.worst if math.isfinite(cell.worst) else None,
                "stock": _side(cell.stock),
                "patched": _side(cell.patched),
            }
            for cell in cells
        ],
        "not run": not_run(cells, setups),
        "verdict": verdict(options, cells, setups),
    }


def _side(side: Side) -> dict[str, object]:
    footprint = None if side.footprint is None else dataclasses.asdict(side.footprint)
    return {"error": side.error, "seconds": round(side.seconds, 2), "footprint": footprint}
