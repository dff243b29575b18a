"""Before each try of `auto_find_batch_size` the Trainer takes FSDP1's units out, and trains what is left of weights."""

from __future__ import annotations

import pytest
from cells import Bench, Setup
from checkpoints import Scene
from faults import canary, runs_out

from trainer_fsdp_patch.patching import registry
from trainer_fsdp_patch.testing.case import Outcome

FLAT = ("must be 2-D", "The size of tensor a (0) must match")


def test_canary() -> None:
    canary("transformers_v4_47_unwrap_model")


def test_another_try(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """https://github.com/huggingface/transformers/issues/34113"""
    scene, setup, action = Scene(bench), Setup("f1", fsdp=1), runs_out("forward")
    assert flat(scene.run(action, setup, patched=False))
    with monkeypatch.context() as context:
        context.setenv(registry.DISABLE, "transformers_v4_47_unwrap_model")
        assert flat(scene.run(action, setup, patched=True))
    assert scene.right(scene.run(action, setup, patched=True), scene.one(action, setup), setup) == ""


def flat(outcomes: list[Outcome]) -> bool:
    """Whether a rank ended on the shape of a shard; the other may have waited for it."""
    return any(text in outcome.error for outcome in outcomes for text in FLAT)
