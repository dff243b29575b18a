"""Writes an adapter's configuration completely or keeps the old one, for tensors without it cannot be loaded.

Area: Saving
Issue: https://github.com/huggingface/peft/blob/v0.20.0/src/peft/config.py
Can be removed when: peft writes the configuration under another name and renames it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.saving import writing

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="peft>=0.11.dev0", target="peft.config")


@patch.wrap("PeftConfigMixin.save_pretrained", "self", "save_directory", "kwargs", only=gates.any_model)
def write_beside(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Write into a folder next to the file and rename: a full disk would leave an empty file."""
    return writing.write_folder(wrapped, *args, **kwargs)
