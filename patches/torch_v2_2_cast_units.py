"""Lets FSDP1's units be cast after they have run, as `bf16_full_eval` does after `train()`.

Area: Training
Issue: https://github.com/pytorch/pytorch/blob/v2.9.0/torch/distributed/fsdp/_flat_param.py
Can be removed when: FSDP1 keeps its sharded parameters right when a module is cast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.training import casting

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel

    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="torch>=2.2.dev0", target="torch.distributed.fsdp.fully_sharded_data_parallel")


@patch.wrap("FullyShardedDataParallel._apply", "self", "args", "kwargs", only=gates.instance_planned)
def read_dtypes_again(wrapped: Wrapped, instance: FullyShardedDataParallel, args: Args, kwargs: Kwargs) -> object:
    """Have each unit take room for the new dtype; it took that before its first forward."""
    return casting.applied(wrapped, instance, *args, **kwargs)
