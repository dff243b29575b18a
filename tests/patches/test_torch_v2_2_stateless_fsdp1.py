"""A sharded checkpoint of plain SGD has no state, and FSDP1 asks for it."""

import checkpoints
from cells import Bench, Setup
from faults import canary


def test_canary() -> None:
    canary("torch_v2_2_stateless_fsdp1")


def test_resume_with_sgd(bench: Bench) -> None:
    """Stock loses the adapter before it comes to this; tests/data/checkpoints.json has it."""
    scene = checkpoints.Scene(bench)
    setup = Setup("f1-sgd", fsdp=1, optim="sgd", sharded_checkpoint=True)
    assert checkpoints.cell(checkpoints.interrupted, scene, setup, patched=True) == ""
