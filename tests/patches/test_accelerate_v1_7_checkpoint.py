"""A full FSDP2 checkpoint holds the shard of rank 0, and a resumed run goes on from the init elsewhere."""

import pytest
from cells import METHODS, Bench, Setup
from faults import canary, fsdp2, resumes, with_trainable_norms


def test_canary() -> None:
    canary("accelerate_v1_7_checkpoint")


@fsdp2
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_fsdp2_resumes(bench: Bench, method: str) -> None:
    resumes(bench, METHODS[method], Setup("f2"), "resumed: ")


def test_norms_beside_the_adapter_resume(bench: Bench) -> None:
    resumes(bench, with_trainable_norms, Setup("f1", fsdp=1), "")
