"""Figures of docs/measured.md that a benchmark counts: the page against a fresh count."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import FLAVOURS

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome

ROOT = Path(__file__).parent.parent


def load(name: str) -> Any:
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line_of_page(*first: str) -> list[str]:
    """Cells of the line of the first table in docs/measured.md that has one which begins with some cells."""
    begin = f"| {' | '.join(first)} |"
    line, *_ = [line for line in (ROOT / "docs" / "measured.md").read_text().splitlines() if line.startswith(begin)]
    return [cell.strip() for cell in line.strip("|").split("|")]


# A benchmark may import another next to it, as a script does.
sys.path.append(str(ROOT / "benchmarks"))
STEP, STEPS, SCALE, PLANNING, BUDGET = map(load, ("adapter_step", "steps", "scale", "planning", "base_budget"))

of_these_releases = pytest.mark.skipif(
    any(map(versions.newer_than_tested, ("torch", "transformers", "accelerate", "peft"))), reason="other releases"
)


@of_these_releases
@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("configure", STEP.NAMES, ids=STEP.NAMES.get)
def test_the_counts_of_a_step_and_of_a_save_are_those_of_the_page(
    monkeypatch: pytest.MonkeyPatch, configure: Any, fsdp: int
) -> None:
    monkeypatch.setattr(STEP, "STEPS", 2)
    fresh = STEP.row(configure, fsdp, STEP.compare(configure, fsdp, repeat=1))
    written = line_of_page(fresh[0])
    exact = [0, *(place for place, name in enumerate(STEP.COLUMNS, 1) if name != "seconds")]
    assert [written[place] for place in exact] == [fresh[place] for place in exact]


def counted(layers: int, rank: int) -> Outcome:
    """Lines of benchmarks/scale.py, in a process whose group ends with it."""
    return Outcome(extra={"rows": [SCALE.measure(ranks, layers) for ranks in SCALE.RANKS]})


@of_these_releases
def test_what_ranks_send_each_other_does_not_grow_with_ranks() -> None:
    [outcome] = forks.launch(counted, 2, ranks=1)
    assert not outcome.error, outcome.extra.get("traceback")
    few, *more = outcome.extra["rows"]
    # Four digests at start-up: the adapter's make-up, the base's tensors and bits, and the adapter's bits.
    assert [(phase, agreed) for phase, _, _, _, agreed, _ in few] == [("start-up", 128), ("step", 0), ("save", 40)]
    for rows in more:
        for line, other in zip(few, rows, strict=True):
            same = slice(2, 5)
            assert other[same] == line[same]
    # Nor with the model: the page has a model of 80 layers.
    for phase, ranks, _, _, agreed, _ in (row for rows in outcome.extra["rows"] for row in rows):
        assert line_of_page(phase, f"{ranks:,}")[4] == f"{agreed:,}"


class Real(torch.utils._python_dispatch.TorchDispatchMode):
    """Tensors that are made on a device other than meta."""

    made = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [item for item in torch.utils._pytree.tree_leaves(result) if isinstance(item, torch.Tensor)]
        Real.made += any(not tensor.is_meta for tensor in tensors)
        return result


def planned(shape: str, rank: int) -> Outcome:
    """What the plan of a shape consists of, with four of its layers, of which the last has experts."""
    model = PLANNING.build(shape, 4)
    with Real():
        plan = PLANNING.make_plan(model)
    units = [len(held) for name, held in plan.units if name.endswith(".layers.3")]
    roles = Counter(item.tensor.role for item in plan.placements)
    return Outcome(extra={"made": Real.made, "roles": dict(roles), "unit": units})


@of_these_releases
@pytest.mark.parametrize(
    ("shape", "adapter", "unit"),
    [
        ("Llama-3 70B, LoRA", {"adapter": 4 * 7 * 2}, 7 + 2),
        ("Llama-3 70B, VeRA", {"adapter": 4 * 7 * 2, "projection": 2}, 7 + 2),
        # Five projections of the attention, three of a dense layer, of shared experts and of each of 256.
        ("DeepSeek-V3, LoRA", {"adapter": 2 * (4 * 5 + 4 * 3 + 256 * 3)}, 5 + 3 + 256 * 3 + 4 + 1),
    ],
)
def test_the_largest_shapes_are_planned_on_meta(shape: str, adapter: dict[str, int], unit: int) -> None:
    [outcome] = forks.launch(planned, shape, ranks=1)
    assert not outcome.error, outcome.extra.get("traceback")
    assert outcome.extra["made"] == 0
    assert {role: count for role, count in outcome.extra["roles"].items() if role != "base"} == adapter
    assert outcome.extra["unit"] == [unit]


@of_these_releases
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


@of_these_releases
@pytest.mark.parametrize(("name", "fsdp"), [("LoRA", 1), pytest.param("QVeRA", 2, marks=pytest.mark.long)])
def test_the_counts_next_to_ddp_and_one_process_are_those_of_the_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, fsdp: int
) -> None:
    if fsdp not in FLAVOURS:
        pytest.skip("this torch has no FSDP2 on a CPU")
    monkeypatch.setattr(STEPS.forks, "TIMEOUT", 120.0)
    STEPS.base().save_pretrained(tmp_path)
    given = argparse.Namespace(repeat=1, fsdp=[fsdp], budgets=[100], steps=STEPS.WARM + 1)
    fresh = STEPS.rows(name, STEPS.train(name, given, str(tmp_path)), [fsdp])
    page = (ROOT / "docs" / "measured.md").read_text()
    assert [line[1] for line in fresh] == ["stock", "patched", "patched, 100 %", "DDP", "floor"]
    for case, side, _, _, *counts in fresh:
        [line] = [line for line in page.splitlines() if line.startswith(f"| {case} | {side} |")]
        assert [cell.strip() for cell in line.strip("|").split("|")][4:] == counts
        assert side != "patched, 100 %" or counts[0] == "1"
