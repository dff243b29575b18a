"""Keeps DDP away from a base that transformers has sharded, and from the adapter next to it.

Area: Start-up
Issue: https://github.com/huggingface/transformers/pull/48873
Can be removed when: upstream trains an adapter next to a natively sharded base in every supported release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.saving import native

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="accelerate>=1.10.dev0", target="accelerate.accelerator")


@patch.wrap("Accelerator.prepare_model", "self", "model", "device_placement", "evaluation_mode", only=gates.model())
def prepare_without_ddp(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Ask for what transformers 5.19 asks for itself."""
    return native.prepare_model(wrapped, *args, **kwargs)
