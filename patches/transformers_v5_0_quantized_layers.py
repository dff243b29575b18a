"""Takes each quantized layer off the accelerator once it is loaded; one rank of a machine keeps its bytes.

Area: Start-up
Issue: https://github.com/huggingface/accelerate/issues/3983
Can be removed when: cpu_ram_efficient_loading is for quantized models too.
"""

from __future__ import annotations

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.loading import streaming
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped, argument

patch = Patch(
    __name__,
    versions="transformers>=5.0.dev0",
    target="transformers.core_model_loading",
    needs=("transformers_v5_0_quantized_reading", "accelerate_v0_30_quantized_layers"),
)


@patch.wrap("set_param_for_module", "model", "target_name", "param_value", "...", only=gates.is_being_read)
def take_off(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """The tensor is set where upstream has it, then its layer is moved."""
    result = wrapped(*args, **kwargs)
    streaming.settle(argument(args, kwargs, 0, "model"), argument(args, kwargs, 1, "target_name"))
    return result


@patch.wrap("WeightRenaming.convert", "self", "layer_name", "model", "...", only=gates.is_being_read)
def take_off_converted(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Some quantizers put a weight into its layer while it is converted."""
    result = wrapped(*args, **kwargs)
    streaming.settle(argument(args, kwargs, 1, "model"), argument(args, kwargs, 0, "layer_name"))
    return result
