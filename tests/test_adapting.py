"""base_budget "auto" under FSDP2: units that stay gathered from a step on, and are given up where memory runs low."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from cells import METHODS, Bench, Setup, reference_of, trial
from faults import fsdp2, runs_out
from test_base_budget import deep
from torch import nn

from trainer_fsdp_patch.adapting import residents
from trainer_fsdp_patch.measuring import memory
from trainer_fsdp_patch.testing import case

__all__ = ["deep"]
LAYER = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64)


def metered(spares: dict[str, list[int]]) -> Any:
    """LoRA on ranks without room for a resident before training, whose steps leave these bytes on each rank."""

    def configure(model: Any) -> Any:
        memory.meter = lambda device: (-(2**40), 0)
        left = iter(spares[os.environ.get("RANK", "0")])
        memory.gauge = lambda device: (next(left), 0)
        return METHODS["lora"](model)

    return configure


@fsdp2
@pytest.mark.parametrize(
    ("spares", "collectives"),
    [
        # Two of four layers fit by what rank 1 has left. They are gathered a last time in the next forward.
        ({"0": [10 * LAYER, 0], "1": [2 * LAYER, 0]}, [13, 14, 11, 10, 9, 9]),
        pytest.param({"0": [10 * LAYER, 0], "1": [2 * LAYER, -1]}, [13, 14, 11, 10, 11, 11], marks=pytest.mark.long),
        ({"0": [2 * LAYER, -2 * LAYER], "1": [2 * LAYER, 5]}, [13, 14, 11, 10, 13, 13]),
        # All four, and FSDP2's embeddings, which it gathers twice. Its root and head stay.
        ({"0": [10 * LAYER, 0], "1": [10 * LAYER, 0]}, [13, 14, 8, 4, 3, 3]),
        pytest.param({"0": [10 * LAYER, 0], "1": [-1, 10 * LAYER]}, [13, 14, 13, 14, 13, 13], marks=pytest.mark.long),
    ],
    ids=["kept", "one given up", "all given up", "all kept", "never"],
)
def test_ranks_keep_units_by_what_all_of_them_have_left(
    deep: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spares: dict[str, list[int]], collectives: list[int]
) -> None:
    """The ranks agree after the second and the fourth step, by one collective each."""
    monkeypatch.setattr(trial, "STEPS", 6)
    setup = Setup("adapts", fsdp=2, budget="auto")
    one = trial.run(reference_of(setup), METHODS["lora"], deep.base, tmp_path / "one", ranks=1, patched=False)
    outcome = trial.run(setup, metered(spares), deep.base, tmp_path / "ranks")
    # What stays gathered is more than the plan has.
    verdict = case.compare(dataclasses.replace(outcome, planned=None), one, setup)
    assert verdict.right, verdict.error
    assert outcome.collectives == collectives


@fsdp2
@pytest.mark.parametrize("sharded", [False, True], ids=["full", "sharded"])
@pytest.mark.parametrize("scenario", [checkpoints.interrupted, checkpoints.evaluated, checkpoints.generated])
def test_what_happens_between_steps_finds_kept_units(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, scenario: Any, sharded: bool
) -> None:
    monkeypatch.setattr(memory, "meter", lambda device: (-(2**40), 0))
    monkeypatch.setattr(memory, "gauge", lambda device: (2**40, 0))
    setup = Setup("between", fsdp=2, budget="auto", sharded_checkpoint=sharded)
    assert checkpoints.cell(scenario, checkpoints.Scene(bench), setup, patched=True) == ""


@fsdp2
def test_a_step_without_memory_gives_them_up(deep: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks run out after the units were kept: the next try gathers them again, and trains right."""
    monkeypatch.setattr(trial, "STEPS", 4)
    monkeypatch.setattr(memory, "meter", lambda device: (-(2**40), 0))
    monkeypatch.setattr(memory, "gauge", lambda device: (10 * LAYER, 0))
    said: list[str] = []
    monkeypatch.setattr(residents.logger, "warning", lambda text, *values: said.append(text % values))
    scene, setup = checkpoints.Scene(deep), Setup("adapts", fsdp=2, budget="auto")
    inside = runs_out("forward", step=3)

    def action(trainer: Any, folder: Path) -> dict[str, Any]:
        kept: list[int] = []

        def count(*args: Any) -> None:
            adapting = residents._WATCHED.get(trainer.model)
            kept.append(len(adapting.kept) if adapting is not None else 0)

        trainer.model.register_forward_pre_hook(count)
        return {**inside(trainer, folder), "kept": kept, "said": said}

    outcomes = scene.run(action, setup, patched=True)
    assert scene.right(outcomes, scene.one(inside, setup), setup) == ""
    for rank, outcome in enumerate(outcomes):
        kept: Any = outcome.extra["kept"]
        assert max(kept) == 5
        assert kept[-1] == 0
        told: Any = outcome.extra["said"]
        assert len(told) == (rank == 0)
        assert rank or "ran out of memory: 5 units" in told[0]


class Unit(nn.Module):
    """A unit of a size, which notes what it is told."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.told = size, []

    def set_reshard_after_forward(self, flag: bool, *, recurse: bool) -> None:
        self.told.append(("forward", flag, recurse))

    def set_reshard_after_backward(self, flag: bool, *, recurse: bool) -> None:
        self.told.append(("backward", flag, recurse))

    def reshard(self) -> None:
        self.told.append(("reshard", True, False))


def test_what_is_given_up_never_comes_back_and_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    units = [Unit(10), Unit(10), Unit(10), Unit(10)]
    monkeypatch.setattr(residents, "candidates", lambda model: units)
    monkeypatch.setattr(residents, "cost", lambda unit: unit.size)
    adapting = residents.Residents.__new__(residents.Residents)
    adapting.kept, adapting.closed, adapting.steps = [], False, 2
    model = nn.Module()
    with caplog.at_level(logging.INFO, logger="trainer_fsdp_patch"):
        adapting.adapt(model, 9)
        assert adapting.kept == []
        adapting.adapt(model, 25)
        assert adapting.kept == [units[1], units[3]], "every other one"
        adapting.adapt(model, 10)
        assert len(adapting.kept) == 3
        adapting.adapt(model, -11)
        assert adapting.kept == [units[1]]
        assert units[3].told[-1] == ("reshard", True, False)
        adapting.adapt(model, 100)
        assert adapting.kept == [units[1]]
        adapting.adapt(model, -100)
        assert adapting.kept == []
    low = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(low) == 1
    assert "memory ran low at step 2" in low[0].getMessage()
    assert len(caplog.records) == 3


def test_when_memory_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    monkeypatch.setattr(memory, "least_spare", lambda device: 0)

    class Record:
        known: frozenset[int]

        def model(self) -> None:
            return None

    class Optimizer:
        param_groups: list[dict[str, list[Any]]]

    adapting = residents.Residents.__new__(residents.Residents)
    record = Record()
    adapting.prepared, adapting.steps, adapting.device = lambda: record, 0, None
    adapting.adapt = lambda model, spare: looked.append(adapting.steps)
    parameter = object()
    record.known = frozenset({id(parameter)})
    ours, others = Optimizer(), Optimizer()
    ours.param_groups, others.param_groups = [{"params": [parameter]}], [{"params": [object()]}]
    for _ in range(200):
        adapting.after_step(ours)
        adapting.after_step(others)
    assert looked == [2, 4, 8, 16, 32, 64, 128, 192]
