"""Writes the adapter file next to the old one, reads it back, and only then puts it in its place.

Upstream: https://github.com/huggingface/peft/blob/v0.20.0/src/peft/peft_model.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.saving import writing

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="peft>=0.11.dev0", target="peft.peft_model")


@patch.wrap("safe_save_file", "tensors", "filename", "metadata", only=gates.any_model)
def write_beside(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> None:
    """Write under another name and rename: a crash or a full disk leaves the file of the earlier save."""
    writing.write_tensors(wrapped, *args, **kwargs)
