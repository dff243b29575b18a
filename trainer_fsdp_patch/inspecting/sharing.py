"""How accelerate's FSDP plugin has the ranks share the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin


def version_of(plugin: FullyShardedDataParallelPlugin) -> int:
    """FSDP's version."""
    # until accelerate 1.6: it knows the first one only
    return int(getattr(plugin, "fsdp_version", 1))


def shards(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> int:
    """Number of ranks over which FSDP shards one copy of the base; fewer than all where groups hold one each.

    Args:
        accelerator: the run's.
        plugin: accelerate's FullyShardedDataParallelPlugin.
    """
    import torch

    mesh = getattr(accelerator, "torch_device_mesh", None)
    if getattr(accelerator, "parallelism_config", None) is not None and mesh is not None:
        return int(mesh["dp_shard_cp"].size())
    strategy = str(getattr(plugin, "sharding_strategy", None))
    if "NO_SHARD" in strategy:
        return 1
    if "HYBRID" not in strategy:
        return int(accelerator.num_processes)
    # FSDP1 takes the devices of a machine for a group.
    devices = getattr(torch, accelerator.device.type).device_count()
    return min(int(accelerator.num_processes), max(1, int(devices)))


def gathers(plugin: FullyShardedDataParallelPlugin) -> int:
    """How often a step gathers a layer: once where it stays gathered from the forward to the backward pass.

    Args:
        plugin: accelerate's FullyShardedDataParallelPlugin.
    """
    after = getattr(plugin, "reshard_after_forward", None)
    # transformers 5.0 to 5.9 gives FSDP2 a sharding_strategy too, which accelerate does not read there.
    strategy = after if version_of(plugin) == 2 else getattr(plugin, "sharding_strategy", None) or after
    return 1 if strategy is False or any(name in str(strategy) for name in ("GRAD_OP", "ZERO2")) else 2
