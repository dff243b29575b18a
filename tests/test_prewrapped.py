"""A model that FSDP wrapped before patch() came is said to be too late, and the next one is repaired."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from cells import METHODS, Bench, Setup, trial
from faults import FLAVOURS

import trainer_fsdp_patch
from trainer_fsdp_patch.errors import PatchError
from trainer_fsdp_patch.patching import prewrapped
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome


def late(strict: bool, setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=False)
    model = METHODS["lora"](trial.load_base(base, setup))
    trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(12))
    assert prewrapped.models() == []
    trainer.train()
    found: dict[str, Any] = {"models": prewrapped.models()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            states = trainer_fsdp_patch.patch(strict=strict)
        except PatchError as error:
            return Outcome(extra={**found, "error": str(error)})
    found["warned"] = [str(item.message) for item in caught if "wrapped by FSDP already" in str(item.message)]
    found["late"] = {state.late for state in states if state.state == "applied"}
    found["again"] = {state.late for state in trainer_fsdp_patch.patch()} - {""}
    return Outcome(extra=found)


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_it_is_told(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    setup = Setup("late", fsdp=fsdp)
    for outcome in forks.launch(late, False, setup, bench.base, str(tmp_path), ranks=2):
        assert not outcome.error, outcome.extra
        assert len(outcome.extra["models"]) == 1
        assert outcome.extra["models"][0].startswith("PeftModel")
        assert outcome.extra["late"] == outcome.extra["again"] == set(outcome.extra["models"])
        [text] = outcome.extra["warned"]
        assert text.startswith(f"patch(): {outcome.extra['models'][0]} wrapped by FSDP already.")


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_strict_raises(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    for outcome in forks.launch(late, True, Setup("late", fsdp=fsdp), bench.base, str(tmp_path), ranks=2):
        assert "wrapped by FSDP already" in outcome.extra["error"]


def test_nothing_is_searched_without_a_process_group() -> None:
    assert prewrapped.models() == []
    assert {state.late for state in trainer_fsdp_patch.patch()} == {""}
