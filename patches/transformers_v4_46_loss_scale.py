"""Keeps the number of ranks out of losses that ignore the Trainer's count of tokens, fully or in part.

Area: Training
Issue: https://github.com/huggingface/transformers/blob/v4.46.2/src/transformers/trainer.py
Can be removed when: the Trainer scales only losses that use its count of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.training import loss_scale

if TYPE_CHECKING:
    from transformers import Trainer

    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="transformers>=4.46.2", target="transformers.trainer")


@patch.wrap(
    "Trainer.compute_loss", "self", "model", "inputs", "return_outputs", "num_items_in_batch", only=gates.trainer
)
def share_of_the_count(wrapped: Wrapped, instance: Trainer, args: Args, kwargs: Kwargs) -> object:
    """Hand the count over as a rank's share."""
    names = ("model", "inputs", "return_outputs", "num_items_in_batch")
    return loss_scale.compute_loss(wrapped, instance, {**dict(zip(names, args, strict=False)), **kwargs})
