"""Adapters that unpack the base weight in their forward meet FSDP1's view of it, which has no quant_state."""

import pytest
from faults import canary, fault, packed
from matrix import Bench, Setup


def test_canary() -> None:
    canary("peft_v0_20_packed_weight")


@packed
@pytest.mark.parametrize("method", ["shira", "miss_bat"])
def test_unpacking(bench: Bench, method: str) -> None:
    setup = Setup("f1-bf16-storage", fsdp=1, dtype="bfloat16", storage="bfloat16", amp="bf16")
    fault(bench, method, setup, "has no attribute 'quant_state'")
