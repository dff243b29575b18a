"""Plain SGD keeps no tensor, and torch asks its tensors for the device to read a full FSDP2 checkpoint to."""

import checkpoints
from cells import Bench, Setup
from faults import canary, fsdp2, scene_fault, where


def test_canary() -> None:
    canary("torch_v2_2_stateless_optimizer")


@fsdp2
@where("accelerate>=1.15.dev0")  # before, stock fails earlier
def test_resume_with_sgd(bench: Bench) -> None:
    scene_fault(bench, checkpoints.interrupted, Setup("f2-sgd", optim="sgd"), "AssertionError")


@fsdp2
@where("accelerate>=1.7.dev0")
def test_resume_with_sgd_patched(bench: Bench) -> None:
    scene = checkpoints.Scene(bench)
    assert checkpoints.cell(checkpoints.interrupted, scene, Setup("f2-sgd", optim="sgd"), patched=True) == ""
