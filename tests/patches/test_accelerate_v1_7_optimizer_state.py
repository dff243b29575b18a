"""A sharded optimizer is saved by parameter names and read by parameter numbers, so that nothing is read."""

import pytest
from cells import METHODS, Bench, Setup
from faults import FLAVOURS, canary, resumes


def test_canary() -> None:
    canary("accelerate_v1_7_optimizer_state")


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_a_sharded_optimizer_is_read(bench: Bench, method: str, fsdp: int) -> None:
    setup = Setup(f"f{fsdp}-sharded", fsdp=fsdp, sharded_checkpoint=True)
    resumes(bench, METHODS[method], setup, "no adapter file was written")
