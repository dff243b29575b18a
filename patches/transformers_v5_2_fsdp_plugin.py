"""Keeps PEFT's wrap policy, one unit for each lora_A and lora_B, away from a plan that replicates them.

Area: Start-up
Issue: https://github.com/huggingface/peft/pull/2681
Can be removed when: PEFT's wrap policy leaves adapters out of FSDP's units and reads the classes that the user gave.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="transformers>=5.2.dev0", target="transformers.trainer")


@patch.wrap("update_fsdp_plugin_peft", "model", "accelerator", only=gates.model())
def leave_the_plan(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Skip the upstream function for a planned model: the plan has set policy and dtypes already.

    The plan also keeps the transformer classes that the user asked to wrap, which PEFT's policy no longer reads.
    """
    return None
