"""The Trainer tries a smaller batch size on a rank that has run out of memory, while others are inside a step.

tests/reports/test_batch_size.py has what the tries train.
"""

from __future__ import annotations

import pytest
from cells import Bench, Setup
from checkpoints import Scene, failure
from faults import canary, runs_out

from trainer_fsdp_patch.patching import registry
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.training import batch_size


def test_canary() -> None:
    canary("transformers_v4_45_batch_size")


def test_one_rank_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the patch the two ranks go on in different steps."""
    monkeypatch.setattr(batch_size, "PATIENCE", 2.0)
    monkeypatch.setattr(forks, "TIMEOUT", 12.0)
    scene, setup = Scene(bench), Setup("f1", fsdp=1)
    with monkeypatch.context() as context:
        context.setenv(registry.DISABLE, "transformers_v4_45_batch_size")
        assert "auto_find_batch_size" not in failure(scene.run(runs_out("forward", (0,)), setup, patched=True))
    for outcome in scene.run(runs_out("forward", (0,)), setup, patched=True):
        assert outcome.error
    assert "auto_find_batch_size" in failure(scene.run(runs_out("forward", (0,)), setup, patched=True))
