"""Puts what transformers 5 asks of the FSDP plugin into the words of an accelerate without FSDP2.

Area: Start-up
Issue: https://github.com/huggingface/transformers/blob/v5.20.2/src/transformers/training_args.py
Can be removed when: no accelerate release before 1.6 is supported any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.preparing import plugin_arguments

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(
    __name__,
    versions="accelerate>=0.30.dev0,<1.6.dev0",
    target="accelerate.utils.dataclasses",
    fixed_in="accelerate 1.6.0",
)


@patch.wrap("FullyShardedDataParallelPlugin.__init__", "self", "...", only=None)
def take_newer_names(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Rename what this release does anyway, and refuse FSDP2 by name; without such arguments nothing is done."""
    return wrapped(*args, **plugin_arguments.as_known(kwargs))
