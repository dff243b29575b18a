"""FSDP1 leaves embeddings and head sharded in generate(), and no rank waits for the others' last token."""

import checkpoints
import pytest
from cells import Bench, Setup
from faults import FLAVOURS, canary, scene_fault


def test_canary() -> None:
    canary("accelerate_v0_30_generate")


def test_generate_during_training(bench: Bench) -> None:
    """https://github.com/huggingface/transformers/issues/34530"""
    scene_fault(bench, checkpoints.generated, Setup("f1", fsdp=1), "must be 2-D")


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_ranks_that_end_at_other_lengths(bench: Bench, fsdp: int, amp: str) -> None:
    setup = Setup("lengths", fsdp=fsdp, amp=amp)
    outcomes = checkpoints.Scene(bench).run(checkpoints.generate_unevenly, setup, patched=True)
    assert checkpoints.failure(outcomes) == ""
    assert [outcome.extra["length"] for outcome in outcomes] == [4, 9]
