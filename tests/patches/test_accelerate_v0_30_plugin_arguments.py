"""transformers 5 gives the plugin arguments that accelerate before 1.6 has not, and FSDP does not start."""

import accelerate.utils.dataclasses as target
import pytest
from cells import Bench, Setup
from faults import canary, fault, where

import trainer_fsdp_patch
from trainer_fsdp_patch.errors import PlanError


@pytest.fixture(autouse=True)
def _without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """These releases look for a device where module states are to be synced."""
    monkeypatch.setenv("FSDP_SYNC_MODULE_STATES", "false")


def test_canary() -> None:
    canary("accelerate_v0_30_plugin_arguments")


@where("transformers>=5.1.dev0")
def test_fault(bench: Bench) -> None:
    fault(bench, "lora", Setup("f1", fsdp=1), "unexpected keyword argument 'fsdp_version'")


@pytest.mark.parametrize("strategy", ["full_shard", "shard_grad_op", "no_shard"])
def test_the_strategy_is_what_was_asked_for(strategy: str) -> None:
    arguments = {"fsdp_version": 1, "reshard_after_forward": strategy}
    with pytest.raises(TypeError, match="fsdp_version"):
        target.FullyShardedDataParallelPlugin(**arguments)
    trainer_fsdp_patch.patch()
    plugin = target.FullyShardedDataParallelPlugin(**arguments)
    assert plugin == target.FullyShardedDataParallelPlugin(sharding_strategy=strategy)


def test_fsdp2_is_refused_by_name() -> None:
    trainer_fsdp_patch.patch()
    for kind in (PlanError, TypeError):
        with pytest.raises(kind, match="has FSDP1 alone"):
            target.FullyShardedDataParallelPlugin(fsdp_version=2)
    with pytest.raises(TypeError, match="unknown_argument"):
        target.FullyShardedDataParallelPlugin(unknown_argument=2)
