"""Gives every rank a quantized base that one rank has loaded, where the model is prepared without a plan.

Area: Start-up
Issue: https://github.com/huggingface/accelerate/issues/3983
Can be removed when: cpu_ram_efficient_loading is for quantized models too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.loading import restoring, streaming
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import argument

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="accelerate>=0.30.dev0", target="accelerate.accelerator")


@patch.wrap("Accelerator.verify_device_map", "self", "model", only=gates.quantized_waits)
def give_all(wrapped: Wrapped, instance: Accelerator, args: Args, kwargs: Kwargs) -> object:
    """`prepare` and `prepare_model` ask this first of each model; all ranks ask it alike."""
    restoring.restore(streaming.loaded(argument(args, kwargs, 0, "model")), instance.device)
    return wrapped(*args, **kwargs)
