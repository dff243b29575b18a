"""Some checkpoints are read on rank 0 only, and a fresh optimizer has no entries to read a sharded one into."""

import pytest
from faults import canary, fsdp2, resumes, where
from matrix import METHODS, Bench, Setup


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
    resumes(bench, METHODS[method], Setup("f1-sharded", fsdp=1, sharded=True), "no adapter file was written")


@fsdp2
@where("accelerate<1.7.dev0")
def test_the_state_of_a_sharded_optimizer_on_fsdp2(bench: Bench) -> None:
    resumes(bench, METHODS["lora"], Setup("f2-sharded", sharded=True), "no adapter file was written")
