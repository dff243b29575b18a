"""Gives a save the whole adapter without gathering the frozen base, or an error before a file is replaced.

Upstream: https://github.com/huggingface/accelerate/pull/4206
"""

from __future__ import annotations

from typing import Any

from trainer_fsdp_patch import checkpoint
from trainer_fsdp_patch.registry import Patch

patch = Patch(__name__, versions="accelerate>=0.30.dev0", target="accelerate.accelerator")


@patch.wrap("Accelerator.get_state_dict", "self", "model", "unwrap")
def state_dict_of_adapter(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Skip the upstream function for a planned model: it gathers all that is frozen, and fails on 8-bit layers."""
    return checkpoint.state_dict(wrapped, instance, *args, **kwargs)
