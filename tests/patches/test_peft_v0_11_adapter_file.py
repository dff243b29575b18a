"""peft writes over the adapter that is there: whoever is killed meanwhile leaves half a file."""

import checkpoints
import pytest
from cells import Bench, Setup
from faults import FLAVOURS, canary, scene_fault


def test_canary() -> None:
    canary("peft_v0_11_adapter_file")


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("when", ["during", "full"])
def test_the_earlier_file_stays(bench: Bench, fsdp: int, when: str) -> None:
    scene_fault(bench, checkpoints.overwritten(when), Setup(f"f{fsdp}", fsdp=fsdp), "")
