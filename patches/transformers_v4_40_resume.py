"""Resumes from checkpoints with rank 0's adapter on every rank, and with the state of a sharded optimizer.

Area: Resuming
Issue: https://github.com/huggingface/accelerate/pull/3904
Can be removed when: the Trainer loads the adapter and a sharded optimizer's state on every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped, argument
from trainer_fsdp_patch.resuming import optimizer_state, resume

if TYPE_CHECKING:
    from transformers import Trainer

patch = Patch(__name__, versions="transformers>=4.40.dev0", target="transformers.trainer")


@patch.wrap("Trainer._load_from_checkpoint", "self", "resume_from_checkpoint", "model", only=gates.trainer)
def load_on_every_rank(wrapped: Wrapped, instance: Trainer, args: Args, kwargs: Kwargs) -> object:
    """Load as always; accelerate reads some checkpoints on rank 0 only, and transformers no adapter file."""
    folder = argument(args, kwargs, 0, "resume_from_checkpoint")
    return resume.load(lambda: wrapped(*args, **kwargs), instance, folder)


@patch.wrap("Trainer._load_best_model", "self", only=gates.trainer)
def load_best_on_every_rank(wrapped: Wrapped, instance: Trainer, args: Args, kwargs: Kwargs) -> object:
    """The same at the end of a run."""
    return resume.load(lambda: wrapped(*args, **kwargs), instance, instance.state.best_model_checkpoint)


@patch.wrap("Trainer._load_optimizer_and_scheduler", "self", "checkpoint", only=gates.trainer)
def load_into_a_state(wrapped: Wrapped, instance: Trainer, args: Args, kwargs: Kwargs) -> object:
    """Make what is read into: a fresh optimizer has no entries, so nothing would be read."""
    with optimizer_state.initialized_optimizer(instance, argument(args, kwargs, 0, "checkpoint")):
        return wrapped(*args, **kwargs)
