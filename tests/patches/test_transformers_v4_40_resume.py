"""Some checkpoints are read on rank 0 only, and a fresh optimizer has no entries to read a sharded one into."""

from pathlib import Path

import checkpoints
import pytest
from cells import METHODS, Bench, Setup
from faults import FLAVOURS, canary, fsdp2, resumes, scene_fault, where

from trainer_fsdp_patch.testing import forks


def test_canary() -> None:
    canary("transformers_v4_40_resume")


@fsdp2
@where("accelerate<1.9.dev0")
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_read_on_rank_0_only(bench: Bench, method: str) -> None:
    resumes(bench, METHODS[method], Setup("f2"), "")


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_the_state_of_a_sharded_optimizer(bench: Bench, method: str) -> None:
    """https://github.com/huggingface/accelerate/pull/3904 mended it for FSDP2 only."""
    resumes(bench, METHODS[method], Setup("f1-sharded", fsdp=1, sharded_checkpoint=True), "no adapter file was written")


def test_save_only_model(bench: Bench) -> None:
    """https://github.com/huggingface/transformers/issues/28320"""
    scene_fault(bench, checkpoints.model_only, Setup("f1", fsdp=1), "")


@where("accelerate>=1.8.dev0")
@pytest.mark.long
def test_below_torch_compile(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    scene, setup = checkpoints.Scene(bench), Setup("f1", fsdp=1)
    # A compiler may be slow. A run that hangs proves nothing of stock either.
    monkeypatch.setattr(forks, "TIMEOUT", 400.0)
    stock = checkpoints.cell(checkpoints.compiled, scene, setup, patched=False)
    assert stock
    assert "hung" not in stock
    assert checkpoints.cell(checkpoints.compiled, scene, setup, patched=True) == ""


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_a_checkpoint_that_is_not_whole_is_refused_on_all_ranks(bench: Bench, fsdp: int) -> None:
    scene = checkpoints.Scene(bench)
    setup = Setup(f"f{fsdp}", fsdp=fsdp, save_steps=1)
    folder = Path(scene.run(checkpoints.train, setup, patched=True)[0].folder)
    (folder / "checkpoint-2" / "scheduler.pt").write_bytes(b"PK")
    outcomes = scene.run(checkpoints.resume_from(2), setup, patched=True, folder=folder)
    for outcome in outcomes:
        assert outcome.error.startswith("AdapterError: ")
        assert "not complete: scheduler.pt is truncated" in outcome.error


@fsdp2
@where("accelerate<1.7.dev0")
def test_the_state_of_a_sharded_optimizer_on_fsdp2(bench: Bench) -> None:
    resumes(bench, METHODS["lora"], Setup("f2-sharded", sharded_checkpoint=True), "no adapter file was written")
