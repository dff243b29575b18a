"""Skips checkpoints whose writer was killed where a run resumes from the last one, and names them.

Upstream: https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/trainer_utils.py
"""

from __future__ import annotations

from typing import Any

from trainer_fsdp_patch import resume
from trainer_fsdp_patch.registry import Patch

patch = Patch(__name__, versions="transformers>=4.40.dev0", target="transformers.trainer")


@patch.wrap("get_last_checkpoint", "folder")
def last_whole_checkpoint(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Ask upstream first; its answer stays where that checkpoint is whole, or not one of ours."""
    return resume.last_checkpoint(wrapped, *args, **kwargs)
