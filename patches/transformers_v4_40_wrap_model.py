"""Plans what FSDP shards and what stays replicated, before the Trainer's model is wrapped.

Area: Start-up
Issue: https://github.com/huggingface/peft/issues/2407
Can be removed when: upstream shards the base and replicates the adapter, under FSDP1 and FSDP2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped, argument
from trainer_fsdp_patch.preparing import prepare

if TYPE_CHECKING:
    from transformers import Trainer

patch = Patch(
    __name__,
    versions="transformers>=4.40.dev0",
    target="transformers.trainer",
    needs=("accelerate_v0_30_backward", "accelerate_v0_30_get_state_dict"),
    alongside=(
        "accelerate_v0_30_checkpoint",
        "accelerate_v1_6_fsdp2_prepare_model",
        "accelerate_v1_7_checkpoint",
        "accelerate_v1_7_optimizer_state",
        "accelerate_v1_8_autocast",
        "accelerate_v1_13_fsdp2_prepare_model",
        "accelerate_v1_15_checkpoint",
        "peft_v0_11_state_dict_names",
        "peft_v0_21_state_dict_names",
        "torch_v2_2_grad_norm",
        "transformers_v4_40_fsdp_plugin",
        "transformers_v4_40_last_checkpoint",
        "transformers_v4_40_resume",
        "transformers_v4_40_save_model",
        "transformers_v5_2_fsdp_plugin",
    ),
)


@patch.wrap("Trainer._wrap_model", "self", "model", "training", "dataloader", only=gates.fsdp_trainer)
def plan_before_wrapping(wrapped: Wrapped, instance: Trainer, args: Args, kwargs: Kwargs) -> object:
    """Prepare the model first: accelerate reads the plugin that this settles."""
    if patch.stands():
        training = argument(args, kwargs, 1, "training", True)
        prepare.prepare(instance, argument(args, kwargs, 0, "model"), training=training)
    return wrapped(*args, **kwargs)
