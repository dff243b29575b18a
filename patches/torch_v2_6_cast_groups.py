"""Lets FSDP2's groups be cast after they have run, as `bf16_full_eval` does after `train()`.

Area: Training
Issue: https://github.com/pytorch/pytorch/blob/v2.9.0/torch/distributed/fsdp/_fully_shard/_fsdp_param.py
Can be removed when: FSDP2 keeps its sharded parameters right when a module is cast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.training import casting

if TYPE_CHECKING:
    from torch import nn

    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="torch>=2.6.dev0", target="torch.distributed.fsdp._fully_shard._fully_shard")


@patch.wrap("FSDPModule._apply", "self", "...", only=gates.instance_planned)
def read_dtypes_again(wrapped: Wrapped, instance: nn.Module, args: Args, kwargs: Kwargs) -> object:
    """Have each group take room for the new dtype; it took that before its first forward."""
    return casting.applied(wrapped, instance, *args, **kwargs)
