"""transformers writes over the adapter file too, of adapters that it added itself."""

import checkpoints
from cells import Bench, Setup
from faults import FLAVOURS, added, canary, scene_fault, takes_adapters


def test_canary() -> None:
    canary("transformers_v4_40_adapter_file")


@takes_adapters
def test_the_earlier_file_stays(bench: Bench) -> None:
    fsdp = FLAVOURS[-1]
    scene_fault(bench, checkpoints.overwritten("during", added), Setup(f"f{fsdp}", fsdp=fsdp), "")
