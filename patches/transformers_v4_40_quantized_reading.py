"""Takes each quantized layer off the accelerator as it is read; one rank of a machine keeps its bytes.

Area: Start-up
Issue: https://github.com/huggingface/accelerate/issues/3983
Can be removed when: transformers before 5.0 is not supported.
"""

from __future__ import annotations

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.loading import reading
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped, argument

patch = Patch(
    __name__,
    versions="transformers>=4.40.dev0,<5.0.dev0",
    target="transformers.modeling_utils",
    needs=("accelerate_v0_30_quantized_layers",),
)


@patch.wrap("_load_state_dict_into_meta_model", "model", "state_dict", "...", only=gates.loads_quantized)
def take_off(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Upstream moves what it has quantized to main memory, or to meta, in a way that few quantizers survive."""
    with reading.settled(argument(args, kwargs, 0, "model"), kwargs["hf_quantizer"]):
        return wrapped(*args, **kwargs)


@patch.wrap("is_fsdp_enabled", only=gates.is_inside_reading)
def leave(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Inside, upstream is to leave each tensor where it was set."""
    return False
