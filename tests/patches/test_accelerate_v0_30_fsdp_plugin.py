"""What a user gave the plugin has to be told from what accelerate fills in."""

import accelerate.utils.dataclasses as target
import pytest
import torch
from faults import canary
from torch.distributed.fsdp import MixedPrecision

import trainer_fsdp_patch
from trainer_fsdp_patch.preparing import fsdp_plugin as engine


@pytest.fixture(autouse=True)
def _without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases before accelerate 1.6 look for a device where module states are to be synced."""
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setenv("FSDP_SYNC_MODULE_STATES", "false")


class Accelerator:
    mixed_precision = "bf16"


def test_canary() -> None:
    canary("accelerate_v0_30_fsdp_plugin")


def test_an_explicit_policy_is_told_from_the_default_that_it_equals() -> None:
    policy = MixedPrecision(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    stock = target.FullyShardedDataParallelPlugin(mixed_precision_policy=policy)
    assert engine.explicit_policy(Accelerator, stock) is None
    trainer_fsdp_patch.patch()
    explicit = target.FullyShardedDataParallelPlugin(mixed_precision_policy=policy)
    assert engine.explicit_policy(Accelerator, explicit) is policy


def test_a_policy_set_after_init_is_the_users_too() -> None:
    trainer_fsdp_patch.patch()
    plugin = target.FullyShardedDataParallelPlugin()
    plugin.set_mixed_precision("bf16")
    assert engine.explicit_policy(Accelerator, plugin) is None
    plugin.mixed_precision_policy = MixedPrecision(torch.float32)
    assert engine.explicit_policy(Accelerator, plugin) is plugin.mixed_precision_policy
