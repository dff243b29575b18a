"""peft writes over the configuration that is there: a full disk leaves an adapter that nothing loads."""

import checkpoints
import pytest
from cells import Bench, Setup
from faults import FLAVOURS, canary, scene_fault


def test_canary() -> None:
    canary("peft_v0_11_adapter_config")


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_the_earlier_configuration_stays(bench: Bench, fsdp: int) -> None:
    scene_fault(bench, checkpoints.config_cut, Setup(f"f{fsdp}", fsdp=fsdp), "")
