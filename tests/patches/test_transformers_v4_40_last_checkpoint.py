"""resume_from_checkpoint=True takes the newest folder, also one whose writer was killed."""

from pathlib import Path

import checkpoints
import pytest
from faults import FLAVOURS, canary, scene_fault
from matrix import Bench, Setup

import trainer_fsdp_patch


def test_canary() -> None:
    canary("transformers_v4_40_last_checkpoint")


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_killed_in_a_checkpoint(bench: Bench, fsdp: int) -> None:
    scene_fault(bench, checkpoints.killed("during"), Setup(f"f{fsdp}", fsdp=fsdp), "")


def test_names_what_it_skips(tmp_path: Path) -> None:
    from transformers import trainer

    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "pytorch_model_fsdp_0").mkdir(parents=True)
    trainer_fsdp_patch.patch("transformers_v4_40_last_checkpoint")
    with pytest.warns(trainer_fsdp_patch.errors.TrainerFsdpPatchWarning, match=r"checkpoint-10 \(there is no trainer_"):
        assert trainer.get_last_checkpoint(str(tmp_path)) is None


def test_other_checkpoints_are_upstreams(tmp_path: Path) -> None:
    from transformers import trainer

    (tmp_path / "checkpoint-3").mkdir()
    trainer_fsdp_patch.patch("transformers_v4_40_last_checkpoint")
    assert trainer.get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-3")
