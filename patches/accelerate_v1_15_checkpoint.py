"""Writes the adapter into FSDP2's full resume checkpoints where 8-bit layers end the run with "no attribute 'SCB'".

Upstream: https://github.com/huggingface/accelerate/pull/4206
"""

from __future__ import annotations

from typing import Any

from trainer_fsdp_patch import checkpoint
from trainer_fsdp_patch.registry import Patch

patch = Patch(__name__, versions="accelerate>=1.15.dev0", target="accelerate.utils.fsdp_utils")


@patch.wrap("_get_model_state_dict", "model", "adapter_only", "sd_options")
def whole_adapter(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Skip torch's state dict for planned models: it looks up every entry as an attribute."""
    return checkpoint.model_state_dict(wrapped, *args, **kwargs)
