"""Adapters that unpack the base weight in their forward meet FSDP1's view of it, which has no quant_state.

Layers whose bytes are packed have their own weight in a forward. So the patch is for those that are not.
"""

import pytest
from cells import Bench, Setup
from faults import canary, fault_without, packed, packing_patch

from trainer_fsdp_patch.patching import registry


def test_canary() -> None:
    canary("peft_v0_20_packed_weight")


@packed
@pytest.mark.parametrize("method", ["shira", "miss_bat"])
def test_unpacking(bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    setup = Setup("f1-bf16-storage", fsdp=1, dtype="bfloat16", storage="bfloat16", amp="bf16")
    both = f"peft_v0_20_packed_weight,{packing_patch(1)}"
    fault_without(both, bench, monkeypatch, method, setup, "has no attribute 'quant_state'")
    monkeypatch.setenv(registry.DISABLE, packing_patch(1))
    _, patched = bench.cell(method, setup, patched=True)
    assert patched.right, patched.error
