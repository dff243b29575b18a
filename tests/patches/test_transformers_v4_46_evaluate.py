"""evaluate() before train() wraps the model in another way, and train() then has no optimizer."""

import checkpoints
import pytest
from cells import Bench, Setup
from faults import FLAVOURS, canary, scene_fault


def test_canary() -> None:
    canary("transformers_v4_46_evaluate")


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_evaluate_before_train(bench: Bench, fsdp: int) -> None:
    """https://github.com/huggingface/transformers/issues/48841"""
    scene_fault(bench, checkpoints.evaluated, Setup(f"f{fsdp}", fsdp=fsdp), "Error")
