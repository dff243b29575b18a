"""Which layers of a model are quantized, and what of each moves into its packed parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer_fsdp_patch.bits import SIZES
from trainer_fsdp_patch.errors import AdapterError
from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.inspecting.inventory import Inventory, Slot
from trainer_fsdp_patch.inspecting.leaves import leaves
from trainer_fsdp_patch.packing.layout import is_movable, layout, shared_ranges
from trainer_fsdp_patch.packing.packed import pack

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trainer_fsdp_patch.packing.layout import Range

_LARGE = 1024
"""Bytes of an integer buffer from which on it is taken for a weight, as GPTQ and AWQ keep theirs."""


@dataclass(frozen=True)
class Candidate:
    """A quantized layer that can be packed.

    Attributes:
        name: canonical name.
        nbytes: of what moves, with what aligns it.
        names: canonical names of the parameters and buffers that move.
    """

    name: str
    nbytes: int
    names: frozenset[str]


def quantized_layers(taken: Inventory) -> dict[str, nn.Module]:
    """Layers of the frozen base that keep something else than plain numbers, by canonical name.

    Args:
        taken: inventory of the model, before anything is packed.
    """
    by_module: dict[int, list[Slot]] = {}
    for slot in taken.slots:
        by_module.setdefault(id(slot.module), []).append(slot)
    return {
        slots[0].name.rpartition(".")[0]: slots[0].module
        for slots in by_module.values()
        if not any(slot.owned for slot in slots) and _is_quantized(slots)
    }


def _is_quantized(slots: list[Slot]) -> bool:
    parameters = [slot for slot in slots if slot.kind == "parameter"]
    if any(slot.tensor.requires_grad for slot in parameters):
        return False
    # bitsandbytes quantizes when a layer is moved to its device. Until then its weight is one of plain numbers.
    if any(getattr(slot.tensor, "bnb_quantized", True) is False for slot in parameters):
        return False
    if any(inventory.is_quantized(slot.tensor) or _dtype(slot) not in SIZES for slot in parameters):
        return True
    # A table of positions next to an embedding is no weight. Nothing of plain numbers but a bias is next to one.
    packed = [slot for slot in slots if slot.kind == "buffer" and slot.persistent and _is_weight(slot)]
    return bool(packed) and all(slot.key == "bias" for slot in parameters)


def _dtype(slot: Slot) -> str:
    return str(slot.tensor.dtype).removeprefix("torch.")


def _is_weight(slot: Slot) -> bool:
    return not slot.tensor.is_floating_point() and _dtype(slot) != "bool" and slot.tensor.nbytes >= _LARGE


def candidates(taken: Inventory, barred: Iterable[str]) -> list[Candidate]:
    """The quantized layers that can be packed.

    Args:
        taken: inventory of the model.
        barred: canonical names of tensors that a user ignores, or that several units share.
    """
    layers, barred = quantized_layers(taken), set(barred)
    shared = shared_ranges(layers.values())
    # A layer may have two names for a tensor, as peft gives AQLM's codes another one.
    users = Counter(tensor for tensor, _ in {(id(slot.tensor), id(slot.module)) for slot in taken.slots})
    tied = {slot.name for slot in taken.slots if users[id(slot.tensor)] > 1}
    found = []
    for name, layer in layers.items():
        names = frozenset(f"{name}.{key}" for key in _moving_keys(layer, shared))
        if names and not names & (barred | tied):
            found.append(Candidate(name, layout(layer, shared)[0], names))
    return found


def _moving_keys(layer: nn.Module, shared: set[Range]) -> set[str]:
    """Keys of the parameters and buffers that move, as a tensor or as what is made of those that move."""
    moving = [leaf for leaf in leaves(layer) if is_movable(leaf, layer, shared)]
    keys = {leaf.place.key for leaf in moving if leaf.place.holder in (layer._parameters, layer._buffers)}
    holders = {id(leaf.place.holder) for leaf in moving}
    return keys | {key for key, parameter in layer._parameters.items() if id(parameter) in holders}


def pack_layers(taken: Inventory, chosen: dict[str, tuple[int, str]], device: torch.device) -> None:
    """Pack the layers that a plan has chosen.

    Args:
        taken: inventory of the model, before FSDP takes it.
        chosen: bytes of each, and the dtype that they are stored in, by canonical name of the layer.
        device: where the layers run.

    Raises:
        AdapterError: a layer is not what it was when the plan was made.
    """
    import torch

    layers = quantized_layers(taken)
    shared = shared_ranges(layers.values())
    for name, (nbytes, _) in chosen.items():
        here = layout(layers[name], shared)[0] if name in layers else 0
        if here != nbytes:
            raise AdapterError(
                name,
                f"{here} quantized bytes where {nbytes} were planned",
                "FSDP would shard other bytes than the plan says; nothing is packed",
                "Load the model on the device that it is trained on, and change no layer while the Trainer prepares it",
                tensor=name,
            )
    for name, (_, dtype) in chosen.items():
        pack(layers[name], name, getattr(torch, dtype), shared, device)
