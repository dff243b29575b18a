"""Figures of docs/measured.md that a benchmark counts: the page against a fresh count."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import FLAVOURS

from trainer_fsdp_patch import versions

ROOT = Path(__file__).parent.parent


def load(name: str) -> Any:
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# A benchmark may import another next to it, as a script does.
sys.path.append(str(ROOT / "benchmarks"))
STEP, BUDGET = load("adapter_step"), load("base_budget")

_tested = pytest.mark.skipif(
    any(map(versions.newer_than_tested, ("torch", "transformers", "accelerate", "peft"))), reason="other releases"
)


@_tested
@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("configure", STEP.NAMES, ids=STEP.NAMES.get)
def test_the_counts_of_a_step_and_of_a_save_are_those_of_the_page(
    monkeypatch: pytest.MonkeyPatch, configure: Any, fsdp: int
) -> None:
    monkeypatch.setattr(STEP, "STEPS", 2)
    fresh = STEP.row(configure, fsdp, STEP.compare(configure, fsdp, repeat=1))
    [line] = [
        line for line in (ROOT / "docs" / "measured.md").read_text().splitlines() if line.startswith(f"| {fresh[0]} |")
    ]
    written = [cell.strip() for cell in line.strip("|").split("|")]
    exact = [0, *(place for place, name in enumerate(STEP.COLUMNS, 1) if name != "seconds")]
    assert [written[place] for place in exact] == [fresh[place] for place in exact]


@_tested
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_the_counts_of_budgets_are_those_of_the_page(monkeypatch: pytest.MonkeyPatch, fsdp: int) -> None:
    monkeypatch.setattr(BUDGET, "STEPS", 2)
    [(configure, name), *_] = BUDGET.NAMES.items()
    fresh = BUDGET.rows(configure, fsdp, BUDGET.compare(configure, fsdp, 1, ("25%", "100%", "DDP")))
    page = (ROOT / "docs" / "base-budget.md").read_text().splitlines()
    written = [[cell.strip() for cell in line.strip("|").split("|")] for line in page if line.startswith(f"| {name}, ")]
    for cells in fresh:
        [found] = [line for line in written if line[:2] == cells[:2]]
        assert found[:-1] == cells[:-1]
