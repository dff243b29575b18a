"""Notes which Trainer looks for its last checkpoint, so that all of its ranks take the same one.

Area: Resuming
Issue: https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/trainer.py
Can be removed when: the ranks of a Trainer agree on the last checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.resuming import latest

if TYPE_CHECKING:
    from transformers import Trainer

    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="transformers>=5.0.dev0", target="transformers.trainer")


@patch.wrap(
    "Trainer.train",
    "self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval",
    only=gates.resumes_from_the_last,
)  # fmt: skip
def note_the_trainer(wrapped: Wrapped, instance: Trainer, args: Args, kwargs: Kwargs) -> object:
    """The search itself is told of a folder and not of a run."""
    with latest.searching(instance):
        return wrapped(*args, **kwargs)
