"""Finds an adapter by canonical names in models and state dicts, and gives it to one rank that asks alone.

Upstream: https://github.com/huggingface/peft/pull/2681
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.saving import peft_state_dict

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

PARAMETERS = ("model", "state_dict", "adapter_name", "unwrap_compiled", "save_embedding_layers")

patch = Patch(__name__, versions="peft>=0.11.dev0", target="peft")


@patch.wrap("get_peft_model_state_dict", *PARAMETERS, only=gates.model())
def canonical_state_dict(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Hand over the model and the state dict with canonical names."""
    return peft_state_dict.answer(wrapped, dict(zip(PARAMETERS, args, strict=False)) | kwargs, to_file=False)


@patch.wrap("peft_model.get_peft_model_state_dict", *PARAMETERS, only=gates.model())
def about_to_write(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """The same for `PeftModel.save_pretrained`, which writes what it gets."""
    return peft_state_dict.answer(wrapped, dict(zip(PARAMETERS, args, strict=False)) | kwargs, to_file=True)
