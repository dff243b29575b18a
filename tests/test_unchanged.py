"""Runs without FSDP or without an adapter are bit for bit what they are without us; Trainers follow each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cells import METHODS, Bench, Setup, reference_of, trial
from safetensors.torch import load_file

from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome, compare


def bare(model: Any) -> Any:
    """Full fine-tuning: no adapter."""
    return model


@pytest.mark.parametrize(
    ("setup", "configure", "ranks"),
    [
        (Setup("one", fsdp=0), METHODS["vera"], 1),
        (Setup("one-amp", fsdp=0, amp="bf16"), METHODS["lora"], 1),
        (Setup("ddp", fsdp=0), METHODS["vera"], 2),
        (Setup("fsdp1", fsdp=1), bare, 2),
        (Setup("fsdp1-amp", fsdp=1, amp="bf16"), bare, 2),
        (Setup("fsdp2", fsdp=2), bare, 2),
        (Setup("fsdp2-amp", fsdp=2, amp="bf16"), bare, 2),
        (Setup("fsdp2-ram", fsdp=2, ram_efficient=True), bare, 2),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_nothing_changes(bench: Bench, tmp_path: Path, setup: Setup, configure: Any, ranks: int) -> None:
    stock, patched = (
        trial.run(setup, configure, bench.base, tmp_path / side, ranks=ranks, patched=side == "patched")
        for side in ("stock", "patched")
    )
    assert not stock.error, stock.extra
    assert not patched.error, patched.extra
    assert (stock.losses, stock.norms, stock.collectives) == (patched.losses, patched.norms, patched.collectives)
    [name] = [path.name for path in (tmp_path / "stock").glob("*model.safetensors")]
    before, after = (load_file(tmp_path / side / name) for side in ("stock", "patched"))
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)


def in_turn(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """VeRA, then LoRA on a new model, with the same TrainingArguments."""
    import torch
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=True)
    for method in ("vera", "lora"):
        torch.manual_seed(0)
        model = METHODS[method](trial.load_base(base, setup))
        trial.nudge(model)
        trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(trial.STEPS * trial.BATCH))
        trainer.train()
    trainer.save_model(folder)
    return Outcome(folder=folder)


@pytest.mark.parametrize("fsdp", [1, 2])
def test_two_trainers_in_turn(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    """accelerate keeps one plugin for the process, so the second plan meets what the first has set."""
    setup = Setup("turn", fsdp=fsdp, amp="bf16")
    outcomes = forks.launch(in_turn, setup, bench.base, str(tmp_path), ranks=2)
    assert not outcomes[0].error, outcomes[0].extra
    reference = bench.reference("lora", reference_of(setup))
    outcomes[0].losses, outcomes[0].norms = reference.losses, reference.norms
    verdict = compare(outcomes[0], reference, setup)
    assert verdict.right, verdict.error


def twice(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """Call train() twice on one Trainer and evaluate between, as scripts do."""
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=True)
    model = METHODS["vera"](trial.load_base(base, setup))
    rows = trial.dataset(trial.STEPS * trial.BATCH)
    trainer = Trainer(model=model, args=given, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model(folder)
    return Outcome(losses=[first, trainer.evaluate()["eval_loss"]])


@pytest.mark.parametrize("fsdp", [1, 2])
def test_train_evaluate_train(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    for outcome in forks.launch(twice, Setup("twice", fsdp=fsdp), bench.base, str(tmp_path), ranks=2):
        assert not outcome.error, outcome.extra
        assert outcome.losses[1] < outcome.losses[0]


@pytest.mark.parametrize("fsdp", [1, 2])
@pytest.mark.parametrize("storage", ["", "uint8", "float32"])
def test_checkpoints_are_written(bench: Bench, tmp_path: Path, fsdp: int, storage: str) -> None:
    """`save_strategy` is "steps" unless a user says otherwise: a checkpoint must not end the run."""

    def child(rank: int) -> Outcome:

        from transformers import Trainer

        setup = Setup("checkpoint", fsdp=fsdp, storage=storage)
        given = trial.enter(setup, str(tmp_path), 2, patched=True)
        given.save_strategy, given.save_steps = "steps", 2
        model = METHODS["lora"](trial.load_base(bench.base, setup))
        trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(trial.STEPS * trial.BATCH))
        trainer.train()
        return Outcome()

    for outcome in forks.launch(child, ranks=2):
        assert not outcome.error, outcome.extra["traceback"]
    assert len(load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")) == 8
