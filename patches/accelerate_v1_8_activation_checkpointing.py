"""Makes FSDP2's activation checkpointing recompute with the first noise, and spare parts of adapted layers.

Area: Training
Issue: https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/fsdp_utils.py
Can be removed when: accelerate keeps the random state in FSDP2's activation checkpointing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.preparing import checkpointing

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="accelerate>=1.8.dev0", target="accelerate.accelerator")


@patch.wrap("fsdp2_apply_ac", "accelerator", "model", only=gates.model())
def keep_rng_state(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Wrap as always, then spare parts of layers, and let each checkpointed layer keep its random state."""
    model = wrapped(*args, **kwargs)
    checkpointing.spare_parts(model)
    checkpointing.keep_rng_state(model)
    return model
