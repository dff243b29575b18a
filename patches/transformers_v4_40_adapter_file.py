"""Writes the file of an adapter that transformers added next to the old one, reads it, and then renames it.

Upstream: https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/modeling_utils.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.saving import writing

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="transformers>=4.40.dev0", target="transformers.modeling_utils")


@patch.wrap("safe_save_file", "tensors", "filename", "metadata", only=gates.any_model)
def write_beside(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> None:
    """Write under another name and rename: a crash or a full disk leaves the file of the earlier save."""
    writing.write_tensors(wrapped, *args, **kwargs)
