"""RAM-efficient loading expects a DTensor for every entry; buffers and 8-bit layers cannot be one."""

import pytest
from faults import canary, fault
from matrix import Bench, Setup


def test_canary() -> None:
    canary("accelerate_v1_6_fsdp2_prepare_model")


@pytest.mark.parametrize("method", ["vera", "pvera", "randlora", "frod"])
def test_ram_efficient_loading(bench: Bench, method: str) -> None:
    fault(bench, method, Setup("f2-ram", ram_efficient=True), "has no attribute 'device_mesh'")


def test_8bit(bench: Bench) -> None:
    fault(bench, "vera", Setup("f2-8bit", dtype="bfloat16", storage="8bit"), "no attribute 'CB'")
