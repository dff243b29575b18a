"""Keeps the frozen base unchanged where a forward runs inside FSDP1's `summon_full_params`, as `generate()` needs it.

Area: Training
Issue: https://github.com/huggingface/transformers/issues/34530
Can be removed when: FSDP1 supports or refuses a forward inside `summon_full_params`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.training import full_params

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="torch>=2.2.dev0", target="torch.distributed.fsdp.fully_sharded_data_parallel")


@patch.wrap(
    "FullyShardedDataParallel.summon_full_params",
    "module", "recurse", "writeback", "rank0_only", "offload_to_cpu", "with_grads",
    only=gates.around(),
)  # fmt: skip
def forward_leaves_it_whole(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Keep units full until the context ends. Upstream shards them after each forward and then writes that back."""
    return full_params.summoned(wrapped, *args, **kwargs)
