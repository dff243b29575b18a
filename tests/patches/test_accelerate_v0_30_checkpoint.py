"""Resume checkpoints hold what the adapter's file would, and lose what else is trained."""

import pytest
from cells import METHODS, Bench, Setup
from faults import canary, fsdp2, resumes, with_trainable_norms

from trainer_fsdp_patch.testing import releases


def test_canary() -> None:
    canary("accelerate_v0_30_checkpoint")


def test_norms_beside_the_adapter_resume(bench: Bench) -> None:
    resumes(bench, with_trainable_norms, Setup("f1", fsdp=1), "resumed: off by")


@fsdp2
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_fsdp2_resumes(bench: Bench, method: str) -> None:
    assert releases.state_dict_type(Setup("f2")) == "SHARDED_STATE_DICT"
    resumes(bench, METHODS[method], Setup("f2"), "no adapter file was written")
