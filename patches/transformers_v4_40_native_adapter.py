"""Saves an adapter that transformers added from the tensors that FSDP gathered, and not from the model of one rank.

Upstream: https://github.com/huggingface/transformers/blob/v4.50.0/src/transformers/modeling_utils.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped, argument
from trainer_fsdp_patch.saving import adapter_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

patch = Patch(
    __name__,
    versions="transformers>=4.40.dev0,<4.50.dev0",
    target="transformers.modeling_utils",
    fixed_in="transformers 4.50.0",
)


@patch.wrap(
    "PreTrainedModel.save_pretrained",
    "self", "save_directory", "is_main_process", "state_dict", "save_function", "push_to_hub", "max_shard_size",
    "safe_serialization", "variant", "token", "save_peft_format", "kwargs",
    only=gates.instance_planned,
)  # fmt: skip
def save_what_was_gathered(wrapped: Wrapped, instance: PreTrainedModel, args: Args, kwargs: Kwargs) -> object:
    """The upstream function asks the model again on rank 0, where FSDP1 waits for the other ranks for ever."""
    with adapter_state.gathered(instance, argument(args, kwargs, 2, "state_dict")):
        return wrapped(*args, **kwargs)
