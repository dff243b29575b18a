"""resume_from_checkpoint=True takes the newest folder, also one whose writer was killed."""

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from cells import METHODS, Bench, Setup, trial
from faults import FLAVOURS, canary, scene_fault

import trainer_fsdp_patch
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome


def test_canary() -> None:
    canary("transformers_v4_40_last_checkpoint")


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_killed_in_a_checkpoint(bench: Bench, fsdp: int) -> None:
    scene_fault(bench, checkpoints.killed("during"), Setup(f"f{fsdp}", fsdp=fsdp), "")


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_names_what_it_skips(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    """All ranks say so, and start from the checkpoint that the main process takes."""
    outcomes = forks.launch(resumed, "cut", Setup("cut", fsdp=fsdp), bench.base, str(tmp_path), ranks=2)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    for outcome in outcomes:
        assert any("the last checkpoint is not complete: checkpoint-3" in text for text in outcome.extra["said"])
        assert outcome.extra["steps"] == [3]


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_what_a_user_removed_is_not_missed(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    """Optimizer, scheduler and random states are deleted to save disk; upstream resumes without them."""
    outcomes = forks.launch(resumed, "removed", Setup("removed", fsdp=fsdp), bench.base, str(tmp_path), ranks=2)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    for outcome in outcomes:
        assert outcome.extra["said"] == []
        assert outcome.extra["steps"] == []


def resumed(fate: str, setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """Train with a checkpoint a step, let something befall the last one, and resume; says the steps taken anew."""
    import torch
    import torch.distributed as dist
    from transformers import Trainer, TrainerCallback

    taken: list[int] = []

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            taken.append(state.global_step)

    given = trial.enter(dataclasses.replace(setup, save_steps=1), folder, 2, patched=True)
    for again in (False, True):
        torch.manual_seed(0)
        trainer = Trainer(
            model=METHODS["lora"](trial.load_base(base, setup)), args=given, callbacks=[Steps()],
            train_dataset=trial.dataset(trial.STEPS * trial.BATCH),
        )  # fmt: skip
        if again:
            dist.barrier()
            last = Path(folder) / f"checkpoint-{trial.STEPS}"
            if rank == 0 and fate == "cut":
                (last / "trainer_state.json").write_text("{")
            for item in last.iterdir() if rank == 0 and fate == "removed" else ():
                if item.name.startswith(("optimizer", "scheduler", "rng_state")):
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
            dist.barrier()
            taken.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", trainer_fsdp_patch.errors.TrainerFsdpPatchWarning)
            trainer.train(resume_from_checkpoint=again or None)
    ours = [item for item in caught if issubclass(item.category, trainer_fsdp_patch.errors.TrainerFsdpPatchWarning)]
    return Outcome(extra={"said": [str(item.message) for item in ours], "steps": taken})


def test_a_search_outside_of_such_a_run_is_upstreams(tmp_path: Path) -> None:
    """Full fine-tuning, DDP and one process go on from what stock goes on from."""
    from transformers import trainer

    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / "pytorch_model_fsdp_0").mkdir(parents=True)
    trainer_fsdp_patch.patch()
    assert trainer.get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
