"""Lets `auto_find_batch_size` continue on all ranks after an out-of-memory error, or names the only rank that had one.

Area: Training
Issue: https://github.com/huggingface/transformers/issues/34113
Can be removed when: transformers retries on all ranks together after one has run out of memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.adapting import residents
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped, argument
from trainer_fsdp_patch.training import batch_size

if TYPE_CHECKING:
    from transformers import Trainer

patch = Patch(__name__, versions="transformers>=4.45.dev0", target="transformers.trainer")


@patch.wrap(
    "Trainer._inner_training_loop",
    "self", "batch_size", "args", "resume_from_checkpoint", "trial", "ignore_keys_for_eval",
    only=gates.finds_batch_size,
)  # fmt: skip
def try_again_whole(wrapped: Wrapped, instance: Trainer, args: Args, kwargs: Kwargs) -> object:
    """Bring FSDP to where a step begins after a try without memory, on all ranks or on none."""
    size = argument(args, kwargs, 0, "batch_size")
    return batch_size.attempt(lambda: wrapped(*args, **kwargs), instance, size, residents.out_of_memory)
