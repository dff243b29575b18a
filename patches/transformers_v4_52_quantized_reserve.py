"""Reserves no accelerator memory for all of a quantized base, where one rank of a machine keeps its bytes.

Area: Start-up
Issue: https://github.com/huggingface/accelerate/issues/3983
Can be removed when: cpu_ram_efficient_loading is for quantized models too.
"""

from __future__ import annotations

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="transformers>=4.52.dev0", target="transformers.modeling_utils")


@patch.wrap(
    "caching_allocator_warmup",
    "model", "expanded_device_map", "hf_quantizer",
    only=gates.loads_quantized,
)  # fmt: skip
def reserve_nothing(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Upstream reserves the bytes of the whole base at once."""
    return None
