"""Keeps PEFT's wrap policy, one unit for each lora_A and lora_B, away from a plan that replicates them.

Before transformers 4.50 it also ends quantized runs of other methods than LoRA with an UnboundLocalError.

Upstream: https://github.com/huggingface/peft/pull/2681
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="transformers>=4.40.dev0,<5.2.dev0", target="transformers.trainer")


@patch.wrap("Trainer._fsdp_qlora_plugin_updates", "self", only=gates.trainer)
def leave_the_plan(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Skip the upstream function for a planned model: the plan has set policy and dtypes already."""
    return None
