"""Figures of docs/measured.md that a benchmark counts: the page against a fresh count."""

from __future__ import annotations

import importlib.util
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


STEP = load("adapter_step")


@pytest.mark.skipif(
    any(map(versions.newer_than_tested, ("torch", "transformers", "accelerate", "peft"))), reason="other releases"
)
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
