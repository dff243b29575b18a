"""Prepares a model for training where it is evaluated first, so that `train()` has an optimizer.

Area: Start-up
Issue: https://github.com/huggingface/transformers/issues/39961
Can be removed when: the Trainer's evaluation leaves a model that `train()` can prepare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.preparing import evaluate

if TYPE_CHECKING:
    from transformers import Trainer

    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="transformers>=5.3.dev0", target="transformers.trainer")


@patch.wrap(
    "Trainer.evaluation_loop",
    "self", "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix",
    only=gates.fsdp_trainer,
)  # fmt: skip
def prepare_first(wrapped: Wrapped, instance: Trainer, args: Args, kwargs: Kwargs) -> object:
    """Do before the loop what it does in another way than `train()`."""
    evaluate.wrap_first(instance)
    return wrapped(*args, **kwargs)
