"""What the test of every patch module does: canary, identity after undo, and the fault with and without it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matrix import Bench, Setup, reference_of

import trainer_fsdp_patch
from trainer_fsdp_patch import registry, trial, wrapping


def canary(name: str) -> None:
    """The seams exist with the declared parameters, take one layer of ours, and are restored to identity."""
    patch = registry.find(name)
    module = importlib.import_module(patch.target)
    assert patch.seams
    before = [wrapping.resolve(module, seam.path) for seam in patch.seams]
    trainer_fsdp_patch.patch(name)
    trainer_fsdp_patch.patch(name)
    assert patch.status().state == "applied"
    for parent, attribute, original in before:
        assert type(vars(parent)[attribute]) is wrapping.PatchWrapper
        assert vars(parent)[attribute].__wrapped__ is original
        assert wrapping.depth(vars(parent)[attribute]) == 1
    trainer_fsdp_patch.unpatch()
    for parent, attribute, original in before:
        assert vars(parent)[attribute] is original
    assert patch.upstream.startswith("https://")
    assert patch.effect.endswith(".")


def fault(bench: Bench, method: str, setup: Setup, expected: str) -> None:
    """Stock fails with `expected` on these versions, and the patched run equals one process."""
    _, stock = bench.cell(method, setup, patched=False)
    assert expected in stock.error
    _, patched = bench.cell(method, setup, patched=True)
    assert patched.right, patched.error


def equals_one_process(bench: Bench, configure: Callable[[Any], Any], setup: Setup, folder: Path) -> None:
    """A model that is not one of the matrix's: patched ranks train and save what one process does."""
    one = trial.run(reference_of(setup), configure, bench.base, folder / "one", ranks=1, patched=False)
    assert not one.error, one.extra
    verdict = trial.compare(trial.run(setup, configure, bench.base, folder / "ranks"), one, setup)
    assert verdict.right, verdict.error
