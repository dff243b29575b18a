"""Adapters that unpack the base weight in their forward meet FSDP1's view of it, which has no quant_state."""

import pytest
from cells import Bench, Setup
from faults import canary, fault_without, packed


def test_canary() -> None:
    canary("peft_v0_20_packed_weight")


@packed
@pytest.mark.parametrize("method", ["shira", "miss_bat"])
def test_unpacking(bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    setup = Setup("f1-bf16-storage", fsdp=1, dtype="bfloat16", storage="bfloat16", amp="bf16")
    fault_without("peft_v0_20_packed_weight", bench, monkeypatch, method, setup, "has no attribute 'quant_state'")
