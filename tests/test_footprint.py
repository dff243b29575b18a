"""What FSDP takes of a rank: the record against a fresh count, and the comparison against what it has to find."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import architectures
import footprints
import pytest
from cells import METHODS, Bench, Setup
from faults import FLAVOURS, fsdp2, packed, where

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.inspecting import units
from trainer_fsdp_patch.measuring.footprint import Footprint
from trainer_fsdp_patch.testing import beyond, case, forks, releases, trial

RECORD = {(row["method"], row["fsdp"]): row for row in json.loads(footprints.DATA.read_text())}
SAMPLE = ["vera", "lora", "t5 vera", "llama_tied lora_tokens", "lora_replicated"]


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench of the record's models, for one test: others train smaller ones."""
    monkeypatch.setattr(architectures, "LAYERS", footprints.LAYERS)
    monkeypatch.setattr(trial, "STEPS", footprints.STEPS)
    return Bench(tmp_path)


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("method", SAMPLE)
def test_a_fresh_count_takes_no_more_than_plan_and_stock(large: Bench, method: str, fsdp: int) -> None:
    row = footprints.count(large, method, fsdp)
    assert row["fault"] == ""
    assert row["patched"][4] == row["planned"][4], "the bound is reached here"
    if not any(map(versions.newer_than_tested, ("torch", "transformers", "accelerate", "peft"))):
        assert row == RECORD[method, fsdp]


def prefetching(setup: Setup, base: str, folder: str, rank: int) -> case.Outcome:
    """Train while FSDP1 gathers the next unit of the backward pass ahead."""
    upstream = trial.enter

    def enter(*args: Any, **kwargs: Any) -> Any:
        given = upstream(*args, **kwargs)
        given.fsdp_plugin_args["backward_prefetch"] = "BACKWARD_PRE"
        return given

    trial.enter = enter
    return trial.train(setup, METHODS["lora"], base, folder, 2, True, rank)


@pytest.mark.skipif(not releases.at_least("transformers", "5.1.0"), reason="older releases are asked in other ways")
def test_prefetching_is_in_the_plan(bench: Bench, tmp_path: Path) -> None:
    """Two units at once, which the plan without it would call one too many."""
    counts = []
    for name, function in (("ahead", prefetching), ("plain", trial.train)):
        setup, rest = Setup(name, fsdp=1), (bench.base, str(tmp_path / name))
        case = (setup, *rest) if name == "ahead" else (setup, METHODS["lora"], *rest, 2, True)
        [outcome, _] = forks.launch(function, *case, ranks=2)
        assert not outcome.error, outcome.extra
        assert outcome.footprint.gathered <= outcome.planned.gathered
        counts.append(outcome.footprint.gathered)
    assert counts[0] > counts[1]


def test_the_record_has_every_method_and_nothing_that_takes_too_much() -> None:
    assert list(RECORD) == list(footprints.cases())
    assert [row for row in RECORD.values() if row["fault"]] == []
    page = footprints.markdown([*RECORD.values()])
    assert "| vera | 5 -> 5 | 197,952 -> 197,376 | 7 -> 7 | 297,344 -> 296,192 |" in page
    assert page == (footprints.DATA.parents[2] / "docs" / "footprints.md").read_text()


@fsdp2
def test_layers_that_are_no_units_are_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that equals one process and gathers the whole base at once is wrong."""
    monkeypatch.setattr(units, "reaches_outside", lambda *args: True)
    outcome, verdict = bench.cell("vera", Setup("f2", fsdp=2), patched=True)
    assert not outcome.error
    assert verdict.worst < 1e-3
    assert "FSDP units hold the base, the plan says 5" in verdict.error


@where("accelerate>=1.15.dev0", "torch>=2.13.dev0")
@pytest.mark.parametrize("storage", ["", pytest.param("bfloat16", marks=packed)])
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_shards_that_train_are_planned_as_accelerate_keeps_them(
    bench: Bench, tmp_path: Path, fsdp: int, storage: str
) -> None:
    """In fp32 on a base of 16 bits; FSDP2 leaves them in theirs beside 4-bit weights. Plans said 16 bits of all."""
    setup = Setup("shards", fsdp=fsdp, placement="shard", dtype="bfloat16", amp="bf16", storage=storage)
    outcome = trial.run(setup, METHODS["lora_head"], bench.base, tmp_path)
    assert outcome.error == ""
    assert outcome.footprint is not None
    assert outcome.planned is not None
    assert outcome.footprint.rest == outcome.planned.rest


TAKEN = Footprint(ranks=2, units=5, rest=90, base=60, replicated=0, gathered=40, collectives=9)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"units": 3}, "3 FSDP units hold the base, stock has 5"),
        ({"units": 3, "replicated": 20}, ""),
        ({"gathered": 41}, "41 bytes of parameters are gathered at once, stock has 40"),
        ({"base": 61}, "61 bytes of the base are held in shards, stock has 60"),
        ({"collectives": 10}, "10 collectives are in a step, stock has 9"),
        # A replicated adapter, and what the plan keeps whole, are the plan's own.
        ({"rest": 100}, ""),
        ({"base": 80, "replicated": 20}, ""),
        ({"units": 6, "gathered": 30}, ""),
    ],
)
def test_comparison_with_stock(change: dict[str, Any], said: str) -> None:
    assert beyond.fault(dataclasses.replace(TAKEN, **change), None, TAKEN) == said


@pytest.mark.parametrize("name", ["gathered", "replicated", "base", "rest"])
def test_comparison_with_the_plan(name: str) -> None:
    more = dataclasses.replace(TAKEN, **{name: vars(TAKEN)[name] + 1})
    assert beyond.fault(more, TAKEN, None).endswith(f"the plan says {vars(TAKEN)[name]}")
    assert beyond.fault(TAKEN, dataclasses.replace(TAKEN, units=None, gathered=None), None) == ""


def test_a_run_that_dies_at_start_up_has_none(bench: Bench, tmp_path: Path) -> None:
    def broken(model: Any) -> Any:
        raise RuntimeError("at start-up")

    outcome = trial.run(Setup("f1", fsdp=1), broken, bench.base, tmp_path)
    assert outcome.error == "RuntimeError: at start-up"
    assert outcome.footprint is None
