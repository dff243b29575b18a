"""Skips checkpoints whose writer was killed when a run resumes from the last one, and names them.

Area: Resuming
Issue: https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/trainer_utils.py
Can be removed when: transformers resumes from complete checkpoints only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.resuming import latest

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(
    __name__,
    versions="transformers>=4.40.dev0",
    target="transformers.trainer",
    alongside=("transformers_v4_40_train", "transformers_v5_0_train"),
)


@patch.wrap("get_last_checkpoint", "folder", only=gates.resuming)
def last_whole_checkpoint(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Ask upstream first; its answer stays where the writer of that checkpoint has finished."""
    return latest.last_checkpoint(wrapped, *args, **kwargs)
