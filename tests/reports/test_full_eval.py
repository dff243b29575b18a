"""`bf16_full_eval` and `fp16_full_eval`: an evaluation after `train()`, and what is trained and saved after it.

The Trainer casts the model for good; one process saves the adapter in that dtype afterwards and trains on in it. FSDP
has taken room to gather in the dtype that the model had before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cells import METHODS, Bench, Setup
from checkpoints import Scene, failure
from faults import FLAVOURS, packed

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.testing import case, releases

SETUPS = [
    *(Setup(f"f{fsdp}", fsdp=fsdp) for fsdp in FLAVOURS),
    *(Setup(f"f{fsdp}-amp", fsdp=fsdp, amp="bf16") for fsdp in FLAVOURS),
    Setup("f1-flat", fsdp=1, use_orig_params=False),
]
LOSS = 2e-2
"""Relative: bf16 has 8 bits, and ranks round other sums than one process."""


def after(trainer: Any, folder: Path) -> dict[str, Any]:
    trainer.train()
    return losses(trainer)


def before(trainer: Any, folder: Path) -> dict[str, Any]:
    found = losses(trainer)
    trainer.train()
    return found


def between(trainer: Any, folder: Path) -> dict[str, Any]:
    trainer.train()
    found = losses(trainer)
    trainer.train()
    return {"losses": found["losses"] + losses(trainer)["losses"]}


def losses(trainer: Any) -> dict[str, Any]:
    return {"losses": [trainer.evaluate()["eval_loss"], trainer.predict(trainer.eval_dataset).metrics["test_loss"]]}


def equal(scene: Scene, action: Callable[..., Any], setup: Setup, method: str, **extra: Any) -> None:
    configure = METHODS[method]
    one = scene.one(action, setup, configure, **extra)
    outcomes = scene.run(action, setup, patched=True, configure=configure, **extra)
    assert failure(outcomes) == "", outcomes[0].extra.get("traceback")
    # From 4.46 to 4.49 a Trainer multiplies them by the number of ranks, under DDP too.
    factor = 1 if versions.at_least("transformers", "4.50.0") or not releases.normalises_over_ranks() else 2
    for outcome in outcomes:
        wanted = [loss * factor for loss in one.extra["losses"]]
        assert outcome.extra["losses"] == pytest.approx(wanted, rel=LOSS)
    verdict = case.compare(outcomes[0], one, dataclasses.replace(setup, dtype="bfloat16"))
    assert verdict.right, verdict.error


@pytest.mark.parametrize("method", ["lora", "vera", "lora_head"])
@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_evaluated_after_training(bench: Bench, setup: Setup, method: str) -> None:
    """The adapter that is saved then has the dtype that one process saves it in."""
    equal(Scene(bench), after, setup, method, bf16_full_eval=True)


@pytest.mark.parametrize("setup", SETUPS[: len(FLAVOURS)], ids=lambda setup: setup.name)
def test_a_sharded_head(bench: Bench, setup: Setup) -> None:
    """Trainable parameters that FSDP shards."""
    equal(Scene(bench), after, dataclasses.replace(setup, placement="shard"), "lora_head", bf16_full_eval=True)


@packed
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_a_packed_base(bench: Bench, fsdp: int, storage: str) -> None:
    """Packed weights are no numbers to cast, and those in bf16 have that dtype already."""
    setup = Setup(f"f{fsdp}-{storage}", fsdp=fsdp, dtype="bfloat16", storage=storage, amp="bf16")
    equal(Scene(bench), after, setup, "lora", bf16_full_eval=True)


@pytest.mark.parametrize("action", [before, between], ids=lambda action: action.__name__)
@pytest.mark.parametrize("setup", SETUPS[: len(FLAVOURS)], ids=lambda setup: setup.name)
def test_trained_after_it(bench: Bench, setup: Setup, action: Any) -> None:
    sgd = dataclasses.replace(setup, optim="sgd")
    equal(Scene(bench), action, sgd, "lora", bf16_full_eval=True, learning_rate=0.3)


@pytest.mark.parametrize("setup", SETUPS[: len(FLAVOURS)], ids=lambda setup: setup.name)
def test_what_one_process_cannot_train_on(bench: Bench, setup: Setup) -> None:
    """The moments of an AdamW that has trained keep their dtype, and its next step ends with an error everywhere."""
    scene = Scene(bench)
    [one] = scene.run(between, dataclasses.replace(setup, fsdp=0), patched=False, ranks=1, bf16_full_eval=True)
    outcomes = scene.run(between, setup, patched=True, bf16_full_eval=True)
    assert "dtype" in one.error
    assert {outcome.error for outcome in outcomes} == {one.error}


@pytest.mark.parametrize("setup", SETUPS[: len(FLAVOURS)], ids=lambda setup: setup.name)
def test_in_fp16(bench: Bench, setup: Setup) -> None:
    equal(Scene(bench), after, setup, "lora", fp16_full_eval=True)


@pytest.mark.parametrize("setup", SETUPS[: len(FLAVOURS)], ids=lambda setup: setup.name)
def test_stock_fails(bench: Bench, setup: Setup) -> None:
    outcomes = Scene(bench).run(after, setup, patched=False, bf16_full_eval=True)
    assert "dtype" in failure(outcomes)
