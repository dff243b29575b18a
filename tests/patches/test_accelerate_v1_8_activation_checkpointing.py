"""FSDP2's activation checkpointing recomputes with another dropout mask, so gradients are another sample's."""

from pathlib import Path

import pytest
from cells import Bench, Setup, trial
from faults import canary
from methods import tuned

DROPOUT = tuned("LoraConfig", r=4, lora_dropout=0.5)


def norms(bench: Bench, folder: Path, *, checkpointed: bool, patched: bool) -> list[float]:
    setup = Setup("ac", activation_checkpointing=checkpointed)
    outcome = trial.run(setup, DROPOUT, bench.base, folder / f"{checkpointed}{patched}", patched=patched)
    return outcome.norms


def test_canary() -> None:
    canary("accelerate_v1_8_activation_checkpointing")


def test_dropout_is_recomputed_with_the_same_mask(bench: Bench, tmp_path: Path) -> None:
    plain = norms(bench, tmp_path, checkpointed=False, patched=True)
    assert norms(bench, tmp_path, checkpointed=True, patched=True) == pytest.approx(plain, rel=1e-5)
    assert norms(bench, tmp_path, checkpointed=True, patched=False) != pytest.approx(plain, rel=1e-2)
