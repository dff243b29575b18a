"""Evaluation before `train()`: the model is wrapped as it would be for training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer_fsdp_patch.inspecting import inventory, sharing
from trainer_fsdp_patch.names import unwrap
from trainer_fsdp_patch.preparing import prepare
from trainer_fsdp_patch.training import optimizer_groups

if TYPE_CHECKING:
    from transformers import Trainer


def wrap_first(trainer: Trainer) -> None:
    """Wrap a model that is evaluated before it is trained as `train()` would, with its optimizer under FSDP2.

    https://github.com/huggingface/transformers/issues/39961

    Args:
        trainer: about to evaluate; nothing happens where its model is wrapped already or is not ours.
    """
    accelerator = trainer.accelerator
    if accelerator._models or getattr(trainer.args, "torch_compile", False):
        return
    prepared = prepare.prepare(trainer, trainer.model)
    if prepared is None or prepared.native:
        return
    plugin = accelerator.state.fsdp_plugin
    if sharing.version_of(plugin) == 2:
        trainer.create_optimizer()
        optimizer_groups.separate(trainer)
        trainer.model, trainer.optimizer = accelerator.prepare(trainer.model, trainer.optimizer)
    else:
        trainer.model = accelerator.prepare(trainer.model)
    trainer.model_wrapped = trainer.model


@contextlib.contextmanager
def evaluating(trainer: Trainer) -> Iterator[None]:
    """Around an evaluation before `train()`, in releases that would take FSDP1's wrapper off and put on another.

    Between the two the Trainer has the unwrapped model, by which `train()` sees that it is wrapped already.

    Args:
        trainer: about to evaluate.
    """
    wrap_first(trainer)
    if trainer.optimizer is not None or inventory.fsdp_version(trainer.model_wrapped) != 1:
        yield
        return
    trainer.model = trainer.model_wrapped
    try:
        yield
    finally:
        trainer.model = unwrap(trainer.model_wrapped)
