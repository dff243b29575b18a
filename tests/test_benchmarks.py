"""Figures of docs/measured.md that a benchmark counts: the page against a fresh count."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import FLAVOURS

from trainer_fsdp_patch import versions

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))


def load(name: str) -> Any:
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STEP, STEPS = load("adapter_step"), load("steps")


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


@pytest.mark.skipif(
    any(map(versions.newer_than_tested, ("torch", "transformers", "accelerate", "peft"))), reason="other releases"
)
@pytest.mark.parametrize(("name", "fsdp"), [("LoRA", 1), ("QVeRA", 2)])
def test_the_counts_next_to_ddp_and_one_process_are_those_of_the_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, fsdp: int
) -> None:
    if fsdp not in FLAVOURS:
        pytest.skip("this torch has no FSDP2 on a CPU")
    monkeypatch.setattr(STEPS.forks, "TIMEOUT", 120.0)
    STEPS.base().save_pretrained(tmp_path)
    given = argparse.Namespace(repeat=1, fsdp=[fsdp], budgets=[], steps=STEPS.WARM + 1)
    fresh = STEPS.rows(name, STEPS.train(name, given, str(tmp_path)), [fsdp])
    page = (ROOT / "docs" / "measured.md").read_text()
    assert [line[1] for line in fresh] == ["stock", "patched", "DDP", "floor"]
    for case, side, _, _, *counts in fresh:
        [line] = [line for line in page.splitlines() if line.startswith(f"| {case} | {side} |")]
        assert [cell.strip() for cell in line.strip("|").split("|")][2:] == counts
