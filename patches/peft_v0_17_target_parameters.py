"""Lets LoRA adapt parameters, such as a layer of experts, that FSDP1 shows as plain tensors in the forward.

Area: Training
Issue: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py
Can be removed when: peft's LoRA on parameters accepts a plain tensor in the forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.preparing import layers

if TYPE_CHECKING:
    from peft.tuners.lora.layer import ParamWrapper

    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="peft>=0.17.dev0", target="peft.tuners.lora.layer")


@patch.wrap("ParamWrapper.forward", "self", "x", "args", "kwargs", only=gates.instance_inside)
def adapt_a_sharded_parameter(wrapped: Wrapped, instance: ParamWrapper, args: Args, kwargs: Kwargs) -> object:
    """Show the gathered tensor as a buffer during the forward: torch parametrizes parameters and buffers only."""
    with layers.as_buffer(instance.get_base_layer(), instance.parameter_name):
        return wrapped(*args, **kwargs)
