"""Keeps FSDP1's activation checkpointing off parts of adapted layers, in which peft no longer finds its adapter.

Area: Training
Issue: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py
Can be removed when: peft finds its dictionaries and embeddings inside of torch's wrappers.
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
def spare_parts(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Have upstream wrap all but parts of layers."""
    return checkpointing.apply(wrapped, *args, **kwargs)
