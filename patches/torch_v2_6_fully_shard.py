"""Keeps modules that cannot be units of FSDP2, such as containers and tied embeddings, in the unit around them.

Area: Start-up
Issue: https://github.com/huggingface/accelerate/pull/4015
Can be removed when: accelerate asks only for units that FSDP2 can take, whatever PEFT has wrapped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.preparing import fsdp2

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="torch>=2.6.dev0", target="torch.distributed.fsdp")


@patch.wrap("fully_shard", "module", "...", only=gates.sharding)
def take_what_can_be_a_unit(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Hand on what can be a unit while accelerate shards a planned model."""
    return fsdp2.fully_shard(wrapped, *args, **kwargs)
