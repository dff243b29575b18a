"""Has FSDP1 checkpoint the same modules on all ranks, and no parts of adapted layers, in which peft is lost.

Area: Training
Issue: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py
Can be removed when: accelerate chooses before FSDP1 shards, and peft finds its parts inside of torch's wrappers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.preparing import checkpointing

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(
    __name__,
    versions="torch>=2.2.dev0",
    target="torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
)


@patch.wrap(
    "apply_activation_checkpointing",
    "model",
    "checkpoint_wrapper_fn",
    "check_fn",
    "auto_wrap_policy",
    only=gates.model(),
)
def checkpoint_alike(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Have upstream wrap whole units and layers, as many on each rank."""
    return checkpointing.apply(wrapped, *args, **kwargs)
