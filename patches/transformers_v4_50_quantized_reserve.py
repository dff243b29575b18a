"""Reserves no accelerator memory for all of a quantized base, where one rank of a machine keeps its bytes.

Area: Start-up
Issue: https://github.com/huggingface/accelerate/issues/3983
Can be removed when: transformers before 5.0 is not supported.
"""

from __future__ import annotations

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(
    __name__,
    versions="transformers>=4.50.dev0,<5.0.dev0",
    target="transformers.modeling_utils",
    needs=("transformers_v4_40_quantized_reading",),
)


@patch.wrap("caching_allocator_warmup", "model", "expanded_device_map", "...", only=gates.reserves_for_quantized)
def reserve_nothing(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Upstream reserves the bytes of the whole base at once."""
    return None
