"""Keeps PEFT's wrap policy, one unit for each lora_A and lora_B, away from a plan that replicates them.

Area: Start-up
Issue: https://github.com/huggingface/peft/pull/2681
Can be removed when: no transformers release before 5.2 is supported any more.
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
    """Skip the upstream function for a planned model: the plan has set policy and dtypes already.

    Before 4.50 the upstream function also ends quantized runs of other methods than LoRA with an UnboundLocalError.
    """
    return None
