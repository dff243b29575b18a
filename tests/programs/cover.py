"""Which cells of the matrix call which wrappers, and a few cells that call each of them once.

    python tests/programs/cover.py --record

trains the scenarios of the stacks and a choice of cells, notes in every rank which wrappers got a call of ours, and
writes tests/data/cover.json: the wrappers that the stacks call, the cells that call the others, and the patches whose
wrappers only their own tests call. `newest.py` runs all three.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# As a program it finds what tests find by pytest's own path.
sys.path[:0] = [str(Path(__file__).parent.parent / name) for name in ("matrix", "helpers")]

import cells
import stacks

from trainer_fsdp_patch.patching import registry, wrapping
from trainer_fsdp_patch.testing import forks

DATA = Path(__file__).parent.parent / "data" / "cover.json"
METHODS = ("vera", "lora", "lora_head", "trainable_tokens", "prefix", "adalora", "dora")
SETUPS = (
    "fp32",
    "amp",
    "4bit-uint8+amp",
    "8bit",
    "amp+accumulate",
    "ac",
    "ram",
    "size",
    "shard",
    "hybrid",
    "torchao-int8",
)


def every_seam() -> dict[str, str]:
    """Patch of each wrapper that concerns what is installed, by its name."""
    concerned = [patch for patch in registry.discover().values() if patch.concerns()]
    return {f"{patch.target}.{seam.path}": patch.name for patch in concerned for seam in patch.seams}


@contextmanager
def noting(path: Path) -> Iterator[Callable[[], set[str]]]:
    """Note the wrappers that get calls of ours in all processes forked inside the block.

    Args:
        path: of a file that every rank appends to.

    Yields:
        A function that gives the names so far, and begins anew.
    """
    owners = {id(seam): f"{patch.target}.{seam.path}" for patch in registry.discover().values() for seam in patch.seams}
    call = wrapping.Seam.call
    # A rank writes a name once: a file that is appended to in one write needs no lock.
    written: set[tuple[int, str]] = set()

    @functools.wraps(call)
    def note(seam: wrapping.Seam, wrapped: Any, instance: object, args: Any, kwargs: Any) -> object:
        name = owners[id(seam)]
        if (os.getpid(), name) not in written and (seam.only is None or seam.only(instance, seam.named(args, kwargs))):
            written.add((os.getpid(), name))
            with path.open("a") as file:
                file.write(f"{name}\n")
        return call(seam, wrapped, instance, args, kwargs)

    def read() -> set[str]:
        found = set(path.read_text().split()) if path.exists() else set()
        path.unlink(missing_ok=True)
        return found

    wrapping.Seam.call = note  # type: ignore[method-assign]
    try:
        yield read
    finally:
        wrapping.Seam.call = call  # type: ignore[method-assign]


def candidates() -> list[tuple[str, cells.Setup]]:
    """Cells that are tried."""
    wanted = [f"{fsdp} {kind}" for kind in SETUPS for fsdp in ("f1", "f2")]
    return [(method, setup) for method, setup in cells.cells() if method in METHODS and setup.name in wanted]


def chosen(called: dict[tuple[str, str], set[str]], missing: set[str]) -> list[tuple[str, str]]:
    """Few cells that call all that any of them calls of what is missing: the one that adds most comes first."""
    result = []
    while missing:
        best = max(called, key=lambda cell: len(called[cell] & missing))
        if not called[best] & missing:
            break
        result.append(best)
        missing = missing - called[best]
    return result


def found() -> dict[str, Any]:
    """The record."""
    forks.TIMEOUT = 60.0
    with tempfile.TemporaryDirectory() as folder, noting(Path(folder) / "seams") as read:
        stacks.here("", stock=False)
        by_stacks = read()
        bench = cells.Bench(Path(folder))
        called: dict[tuple[str, str], set[str]] = {}
        for method, setup in candidates():
            bench.cell(method, setup, patched=True)
            called[method, setup.name] = read()
    every = every_seam()
    picked = chosen(called, set(every) - by_stacks)
    left = set(every) - by_stacks - set().union(*(called[cell] for cell in picked))
    return {
        "stacks": sorted(by_stacks & set(every)),
        "cells": [{"method": cell[0], "setup": cell[1], "seams": sorted(called[cell] - by_stacks)} for cell in picked],
        "tests": sorted({every[name] for name in left}),
    }


def main() -> int:
    """Print the record, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write tests/data/cover.json")
    given = parser.parse_args()
    text = json.dumps(found(), indent=1) + "\n"
    if given.record:
        DATA.write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
