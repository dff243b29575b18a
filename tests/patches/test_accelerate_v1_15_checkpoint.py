"""A full resume checkpoint of an FSDP2 run with 8-bit layers."""

from pathlib import Path

import pytest
import torch
from faults import canary
from matrix import METHODS, Bench, Setup, trial

from trainer_fsdp_patch.trial import Outcome

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
    patched = trial.launch(saving, setup, bench.base, str(tmp_path / "patched"), ranks=2)
    assert not any(outcome.error for outcome in patched), patched[0].extra
    found = torch.load(tmp_path / "patched/checkpoint-2/pytorch_model_fsdp.bin", weights_only=True)
    assert len(found) == 8
    assert all("lora_" in name and tensor.isfinite().all() for name, tensor in found.items())
    monkeypatch.setenv("TRAINER_FSDP_PATCH_DISABLE", NAME)
    stock = trial.launch(saving, setup, bench.base, str(tmp_path / "stock"), ranks=2)
    assert "no attribute 'SCB'" in stock[0].error


def resuming(method: str, folder: str, setup: Setup, base: str, resume: bool, rank: int) -> Outcome:
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=True)
    given.save_strategy, given.save_steps = "steps", 2
    model = METHODS[method](trial.load_base(base, setup))
    trial.nudge(model)
    trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(trial.STEPS * trial.BATCH))
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if resume else None)
    adapter = {name: item.detach().clone() for name, item in model.named_parameters() if item.requires_grad}
    return Outcome(steps=[adapter])


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_what_is_written_resumes(bench: Bench, tmp_path: Path, method: str) -> None:
    setup = Setup("resume")
    first, second = (
        trial.launch(resuming, method, str(tmp_path), setup, bench.base, resume, ranks=2) for resume in (False, True)
    )
    for outcome in (*first, *second):
        assert not outcome.error, outcome.extra
        for name, tensor in first[0].steps[0].items():
            assert torch.equal(tensor, outcome.steps[0][name]), name
