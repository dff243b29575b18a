"""A full resume checkpoint of an FSDP2 run with 8-bit layers, and of FSDP1 where peft reads it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import METHODS, Bench, Setup, trial
from faults import canary, resumes, with_trainable_norms

from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome

NAME = "accelerate_v1_15_checkpoint"


def test_canary() -> None:
    canary(NAME)


def saving(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=True)
    given.save_strategy, given.save_steps = "steps", 2
    model = METHODS["lora"](trial.load_base(base, setup))
    Trainer(model=model, args=given, train_dataset=trial.dataset(trial.STEPS * trial.BATCH)).train()
    return Outcome()


def test_8bit_checkpoints(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup("8bit", dtype="bfloat16", storage="8bit")
    patched = forks.launch(saving, setup, bench.base, str(tmp_path / "patched"), ranks=2)
    assert not any(outcome.error for outcome in patched), patched[0].extra
    found = torch.load(tmp_path / "patched/checkpoint-2/pytorch_model_fsdp.bin", weights_only=True)
    assert len(found) == 8
    assert all("lora_" in name and tensor.isfinite().all() for name, tensor in found.items())
    monkeypatch.setenv("TRAINER_FSDP_PATCH_DISABLE", NAME)
    without = forks.launch(saving, setup, bench.base, str(tmp_path / "without"), ranks=2)
    # Without it the plan stands back, and 8-bit layers do not get as far as a checkpoint.
    assert "no attribute 'CB'" in without[0].error


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_fsdp1_resumes(bench: Bench, method: str) -> None:
    """Stock fails already when it writes: peft 0.21 finds no key."""
    resumes(bench, METHODS[method], Setup("f1", fsdp=1), "keys missing")


@pytest.mark.parametrize("fsdp", [1, 2])
def test_norms_beside_the_adapter_resume(bench: Bench, fsdp: int) -> None:
    resumes(bench, with_trainable_norms, Setup(f"f{fsdp}", fsdp=fsdp), "keys missing" if fsdp == 1 else "right")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda found: found.popitem(), "not in the checkpoint, as 0 more tensors"),
        (lambda found: found.update({"lora_A.weight": torch.zeros(2)}), "lora_A.weight: in the checkpoint, but not"),
        (lambda found: found.update({key: value[:1] for key, value in found.items()}), "or the shard of one rank"),
    ],
    ids=["missing", "foreign", "shard"],
)
@pytest.mark.parametrize("fsdp", [1, 2])
def test_a_checkpoint_of_another_adapter_is_refused_on_every_rank(
    bench: Bench, tmp_path: Path, fsdp: int, change: Callable[[dict[str, Any]], Any], expected: str
) -> None:
    setup = Setup(f"f{fsdp}", fsdp=fsdp, save_steps=2)
    assert not trial.run(setup, METHODS["lora"], bench.base, tmp_path).error
    file = tmp_path / "checkpoint-2" / "pytorch_model_fsdp.bin"
    found = torch.load(file, weights_only=True)
    change(found)
    torch.save(found, file)
    resuming = dataclasses.replace(setup, resume=str(file.parent))
    outcomes = forks.launch(trial.train, resuming, METHODS["lora"], bench.base, f"{tmp_path}/again", 2, True, ranks=2)
    for outcome in outcomes:
        assert outcome.error.startswith("AdapterError: ")
        assert expected in outcome.error
