"""The save of an adapter that transformers added asks the model of rank 0 again, and FSDP1 waits for the others."""

from pathlib import Path

import pytest
from cells import Bench, Setup, trial
from faults import added, canary, equals_one_process

from trainer_fsdp_patch.testing import forks


def test_canary() -> None:
    canary("transformers_v4_40_native_adapter")


def test_the_save_ends(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup("added", fsdp=1)
    monkeypatch.setattr(forks, "TIMEOUT", 15.0)
    stock = forks.launch(trial.train, setup, added, bench.base, f"{tmp_path}/stock", 2, False, ranks=2)
    assert any(outcome.error for outcome in stock)
    assert not list(tmp_path.glob("stock/adapter_model*"))
    equals_one_process(bench, added, setup, tmp_path)
