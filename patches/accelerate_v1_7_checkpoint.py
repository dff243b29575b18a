"""Writes and reads the full adapter in resume checkpoints, where FSDP2 keeps only rank 0's shard.

Area: Resuming
Issue: https://github.com/huggingface/accelerate/pull/4206
Can be removed when: no accelerate release before 1.15 is supported any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.resuming import resume

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="accelerate>=1.7.dev0,<1.15.dev0", target="accelerate.utils.fsdp_utils")


@patch.wrap("_get_model_state_dict", "model", "adapter_only", "sd_options", only=gates.model())
def whole_adapter(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Skip the upstream function for planned models: every rank holds the adapter already."""
    return resume.model_state_dict(wrapped, *args, **kwargs)


@patch.wrap("_set_model_state_dict", "model", "state_dict", "adapter_only", "sd_options", only=gates.model())
def read_adapter(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Skip the upstream function for planned models: it takes a part that fits for the full tensor."""
    return resume.load_model_state_dict(wrapped, *args, **kwargs)
