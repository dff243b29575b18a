"""Reads a quantized base tensor by tensor, where each layer leaves the accelerator once it is loaded.

Area: Start-up
Issue: https://github.com/huggingface/accelerate/issues/3983
Can be removed when: cpu_ram_efficient_loading is for quantized models too.
"""

from __future__ import annotations

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.loading import reading
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped, argument

patch = Patch(__name__, versions="transformers>=5.0.dev0", target="transformers.modeling_utils")


@patch.wrap(
    "convert_and_load_state_dict_in_model",
    "model", "state_dict", "load_config", "...",
    only=gates.reads_quantized,
)  # fmt: skip
def read_in_turn(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Threads would load faster than layers are moved."""
    with reading.in_turn(argument(args, kwargs, 0, "model")):
        return wrapped(*args, **kwargs)
