"""Replicated gradients have to be averaged, once at the end of an accumulation window."""

from pathlib import Path
from typing import Any

import pytest
from cells import METHODS, Bench, Setup, reference_of, trial
from faults import FLAVOURS, canary

from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome, compare

NAME = "accelerate_v0_30_backward"


def test_canary() -> None:
    canary(NAME)


def without_average(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """Train patched, with the averaging alone taken out."""
    from trainer_fsdp_patch.ranks import collectives

    collectives.average_gradients = lambda *args: 0
    return trial.train(setup, METHODS["vera"], base, folder, 2, True, rank)


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_without_it_ranks_train_adapters_of_their_own(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    outcomes = forks.launch(without_average, Setup("alone", fsdp=fsdp), bench.base, str(tmp_path), ranks=2)
    for outcome in outcomes:
        assert "its bits differ between ranks before saving" in outcome.error


def counted(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    from trainer_fsdp_patch.ranks import collectives

    upstream, calls = collectives.average_gradients, []
    collectives.average_gradients = lambda *args: calls.append(upstream(*args))
    outcome = trial.train(setup, METHODS["vera"], base, folder, 2, True, rank)
    outcome.extra["calls"] = calls
    return outcome


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_one_average_for_each_accumulation_window(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    setup = Setup("window", fsdp=fsdp, accumulation=3)
    for outcome in forks.launch(counted, setup, bench.base, str(tmp_path), ranks=2):
        assert outcome.extra["calls"] == [1] * trial.STEPS


def test_without_it_the_plan_stands_back(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_FSDP_PATCH_DISABLE", NAME)
    setup: Any = Setup("f1-flat-off", fsdp=1, use_orig_params=False)
    outcome = trial.run(setup, METHODS["vera"], bench.base, tmp_path, patched=True)
    verdict = compare(outcome, bench.reference("vera", reference_of(setup)), setup)
    assert "uniform `requires_grad`" in verdict.error
