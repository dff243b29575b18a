"""Lets AdaLora record the ranks that it keeps under the names that the saved tensors have.

Area: Saving
Issue: https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/adalora/layer.py
Can be removed when: AdaLora removes the names of wrappers before it records a parameter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.saving import naming

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="peft>=0.11.dev0", target="peft.tuners.adalora.layer")


@patch.wrap("RankAllocator.update_and_allocate", "self", "model", "global_step", "force_mask", only=gates.part())
@patch.wrap("RankAllocator.mask_using_rank_pattern", "self", "model", "rank_pattern", only=gates.part())
def canonical_ranks(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Hand over the model with the names that state dicts use."""
    return naming.call_with_canonical_names(wrapped, *args, **kwargs)
