"""Layers that one rank of a machine has loaded are handed to the others, where FSDP does not do it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from trainer_fsdp_patch.inspecting.leaves import leaves, raw, span
from trainer_fsdp_patch.loading import moving, streaming
from trainer_fsdp_patch.names import PACKED
from trainer_fsdp_patch.packing.packed import packed_of
from trainer_fsdp_patch.packing.stand_in import is_stand_in
from trainer_fsdp_patch.ranks import collectives

if TYPE_CHECKING:
    import torch
    from torch import nn


def restore(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Give every rank the bytes of rank 0, layer by layer. All ranks call it alike, with the same layers.

    Args:
        layers: from `streaming.loaded`; of a packed one it is what is not packed.
        device: of the collectives, where the tensors are afterwards.
    """
    layers = list(layers)
    for layer in layers:
        places = [leaf for leaf in leaves(layer) if leaf.path != PACKED and not is_stand_in(leaf.tensor)]
        if packed_of(layer) is not None:
            # FSDP takes what is in its slots.
            slots = (layer._parameters, layer._buffers)
            places = [leaf for leaf in places if not any(leaf.place.holder is item for item in slots)]
        moving.put(layer, places, device)
        paths = {leaf.path for leaf in places}
        here = {span(leaf.tensor): leaf.tensor for leaf in leaves(layer) if leaf.path in paths and leaf.tensor.numel()}
        collectives.broadcast(map(raw, here.values()))
    streaming.forget(layers)


def fill(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Give every rank the packed bytes of rank 0, layer by layer, in main memory, where FSDP does not hand them out.

    Args:
        layers: packed ones.
        device: of the collectives, which has room for one layer at a time.
    """
    import torch

    for layer in layers:
        stored = layer._parameters[PACKED]
        assert stored is not None
        full = torch.empty_like(stored, device=device) if stored.is_meta else stored.detach().to(device)
        collectives.broadcast([full])
        if stored.is_meta:
            layer._parameters[PACKED] = torch.nn.Parameter(full.cpu(), requires_grad=False)
