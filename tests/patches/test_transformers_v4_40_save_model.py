"""Under SHARDED_STATE_DICT the Trainer ends well and writes no adapter file."""

import pytest
from cells import Bench, Setup
from faults import FLAVOURS, canary, fault


def test_canary() -> None:
    canary("transformers_v4_40_save_model")


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_the_adapter_is_written(bench: Bench, fsdp: int, method: str) -> None:
    fault(bench, method, Setup(f"f{fsdp}-sharded", fsdp=fsdp, sharded_checkpoint=True), "no adapter file was written")
