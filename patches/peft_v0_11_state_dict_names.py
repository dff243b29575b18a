"""Finds modules_to_save, trainable tokens and embeddings by canonical names, so that nested wrappers do not hide them.

Upstream: https://github.com/huggingface/peft/pull/2681
"""

from __future__ import annotations

from typing import Any

from trainer_fsdp_patch import naming
from trainer_fsdp_patch.registry import Patch

PARAMETERS = ("model", "state_dict", "adapter_name", "unwrap_compiled", "save_embedding_layers")

patch = Patch(__name__, versions="peft>=0.11.dev0", target="peft")


@patch.wrap("get_peft_model_state_dict", *PARAMETERS)
@patch.wrap("peft_model.get_peft_model_state_dict", *PARAMETERS)
def canonical_state_dict(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand over the model with the names that state dicts use."""
    return naming.call_with_canonical_names(wrapped, *args, **kwargs)
