"""Adapters that came after a model was prepared, such as that of the next task, when `train()` is called again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch.errors import AdapterError
from trainer_fsdp_patch.planning.prepared import Prepared
from trainer_fsdp_patch.ranks import agreement, collectives
from trainer_fsdp_patch.saving import adapter_state
from trainer_fsdp_patch.training import steps

if TYPE_CHECKING:
    import torch


def take_up(prepared: Prepared, device: torch.device) -> None:
    """Replicate, broadcast and average them as the plan has it for the first ones; all ranks call this alike.

    Args:
        prepared: of a model that is trained again.
        device: of the collectives.

    Raises:
        AdapterError: on all ranks, where one holds others.
    """
    tensors = prepared.later()
    _agree({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, device)
    if not tensors:
        return
    for tensor in tensors.values():
        if tensor.device != device:
            tensor.data = tensor.data.to(device)
    collectives.broadcast(tensors.values())
    steps.take_up(prepared, tensors)
    model = prepared.model()
    adapter_state.note_keys(prepared, adapter_state.keys(model, adapter_state.live(model, prepared)))


def _agree(items: dict[str, object], device: torch.device) -> None:
    difference = agreement.first_difference([items], device, "comparison of adapters that came later")
    if difference is not None:
        name, rank, *_ = difference
        raise AdapterError(
            name,
            f"part of an adapter that came after the model was prepared, not alike on rank 0 and rank {rank}",
            "One adapter cannot be trained from different ones",
            "Add the same adapter on every rank",
            tensor=name,
        )
