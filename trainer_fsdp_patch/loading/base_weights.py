"""The frozen base is the same on all ranks before FSDP takes a part of it from each."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer_fsdp_patch import bits
from trainer_fsdp_patch.errors import AdapterError
from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.inspecting.leaves import span
from trainer_fsdp_patch.loading import taking
from trainer_fsdp_patch.planning.prepared import Prepared
from trainer_fsdp_patch.ranks import agreement, collectives

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

logger = logging.getLogger("trainer_fsdp_patch")


def synchronize(prepared: Prepared, accelerator: Accelerator, taken: inventory.Inventory) -> None:
    """Give every rank rank 0's bits of each tensor of the base that differs, as DDP does.

    An initialization of the adapter that alters the base, such as PiSSA's, draws random numbers. Each rank draws others
    unless a seed was set. Each rank would then shard a base of its own.

    Args:
        prepared: a model whose ranks have agreed on the adapter.
        accelerator: the run's.
        taken: the model's inventory.

    Raises:
        AdapterError: on all ranks, where their bases do not even have the same tensors.
    """
    if prepared.native or accelerator.num_processes == 1:
        return
    by_fsdp = taking.hands_out(prepared, accelerator, prepared.model().parameters())
    named = _frozen(prepared, taken, by_fsdp)
    _refuse_other_tensors(named, accelerator.device)
    differing = _differing([tensor for _, tensor in named], accelerator.device) if named else []
    for index in differing:
        tensor = named[index][1]
        copy = tensor.detach().to(accelerator.device, copy=True).contiguous()
        collectives.broadcast([copy])
        tensor.detach().copy_(copy)
    if differing and accelerator.is_main_process:
        name, others = named[differing[0]][0], len(differing) - 1
        logger.info("%s and %d more frozen tensors differed between ranks: all have rank 0's.", name, others)


_COMPARISON = "comparison of the frozen base"


def _frozen(prepared: Prepared, taken: inventory.Inventory, by_fsdp: bool) -> list[tuple[str, torch.Tensor]]:
    """Weights and persistent buffers of the base by canonical name, each once, and what packed ones consist of.

    Args:
        prepared: the model's record.
        taken: the model's inventory.
        by_fsdp: whether FSDP hands out what it shards, so that only what it ignores is left.
    """
    shared = {id(tensor) for tensor in prepared.of_adapter().values()}
    ignored = {id(tensor) for tensor in prepared.tensors}
    seen: set[int] = set()
    parts = []
    for slot in taken.slots:
        key = id(slot.tensor)
        ours = key in shared or slot.name in prepared.sharded_names
        # What code computes, and no state dict has, may be cached for as many positions as one rank has seen.
        if ours or not slot.persistent or (by_fsdp and key not in ignored) or key in seen:
            continue
        seen.add(key)
        parts += [(f"{slot.name}{suffix}", part) for suffix, part in _parts(slot.tensor)]
    return parts


def _parts(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor, or what it is made of; and the statistics that quantizers keep next to packed numbers."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    data = tensor.data
    if is_traceable_wrapper_subclass(data):
        for name in data.__tensor_flatten__()[0]:
            yield from ((f".{name}{suffix}", part) for suffix, part in _parts(getattr(data, name)))
        return
    yield "", data
    pending = [("", tensor)] if inventory.is_quantized(tensor) else []
    seen = {span(data)}
    while pending:
        prefix, owner = pending.pop()
        for key, value in sorted(getattr(owner, "__dict__", {}).items()):
            if isinstance(value, torch.Tensor) and span(value) not in seen:
                seen.add(span(value))
                yield f"{prefix}.{key}", value.data
            elif type(value).__name__ == "QuantState":
                pending.append((f"{prefix}.{key}", value))


def _refuse_other_tensors(named: list[tuple[str, torch.Tensor]], device: torch.device) -> None:
    """Refuse bases that have other tensors on one rank.

    Raises:
        AdapterError: on all ranks, naming the first tensor.
    """
    kinds = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in named}
    difference = agreement.first_difference([kinds], device, _COMPARISON)
    if difference is None:
        return
    name, rank, here, there = difference
    sides = ("rank 0", f"rank {rank}") if here != "absent" else (f"rank {rank}", "rank 0")
    raise AdapterError(
        name,
        f"{here if here != 'absent' else there} on {sides[0]}, and not so on {sides[1]}",
        "FSDP would put one base together from different ones",
        "Load the same base model in the same way on every rank",
        tensor=name,
    )


def _differing(tensors: list[torch.Tensor], device: torch.device) -> list[int]:
    """Places of the tensors whose bits are not the same on all ranks. Those on meta somewhere are FSDP's to fill."""
    import torch

    # The first number says whether a rank has the tensor. Its smallest is zero where one has it on meta.
    absent, present = torch.zeros(3, dtype=torch.int64, device=device), torch.ones(1, dtype=torch.int64, device=device)
    table = torch.stack(
        [absent if tensor.is_meta else torch.cat([present, bits.fingerprint(tensor).to(device)]) for tensor in tensors]
    )
    return agreement.differing_rows(table, _COMPARISON, lambda low, high: (low != high).any(dim=1) & (low[:, 0] > 0))
