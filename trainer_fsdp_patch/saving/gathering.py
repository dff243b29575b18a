"""Trainable tensors that FSDP has sharded: full for a save, and each rank's part after a load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.names import canonical, unwrap
from trainer_fsdp_patch.planning.prepared import Prepared, prepared_for
from trainer_fsdp_patch.ranks import agreement, collectives

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor


def full_tensors(model: nn.Module, prepared: Prepared) -> dict[str, torch.Tensor]:
    """Sharded trainable tensors, gathered: on every rank, by canonical name; every rank takes part.

    Args:
        model: as prepared by accelerate, or before that.
        prepared: its record.
    """
    full: dict[str, torch.Tensor] = {}
    if prepared.sharded_names:
        with _summoned(model, writeback=False):
            for name, tensor in _named(model, prepared):
                with collectives.collective("gathering of the adapter"):
                    gathered = tensor.full_tensor() if isinstance(tensor, inventory.dtensor()) else tensor
                full[name] = gathered.detach().clone()
    return full


def in_stored_dtype(prepared: Prepared, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors in the dtypes that they were given, or cast to; accelerate trains sharded ones in fp32.

    Args:
        prepared: record of the model.
        named: full sharded tensors by canonical name.
    """
    import torch

    if prepared.cast is not None:
        return {name: tensor.to(prepared.cast) for name, tensor in named.items()}
    dtypes = {item.tensor.name: getattr(torch, item.tensor.dtype) for item in prepared.plan.sharded}
    return {name: tensor.to(dtypes[name]) for name, tensor in named.items()}


def dtype(model: nn.Module, prepared: Prepared) -> torch.dtype | None:
    """The dtype of the sharded tensors as FSDP holds them, or None where there are none.

    Args:
        model: as prepared by accelerate, or before that.
        prepared: its record.
    """
    flat = [unit._handle.flat_param for unit in own_units(model) if unit._handle]
    held: Sequence[torch.Tensor] = flat or [tensor for _, tensor in _named(model, prepared)]
    return held[0].dtype if held else None


def own_units(model: nn.Module) -> list[FullyShardedDataParallel]:
    """FSDP1's units of trainable modules; none where the plan shards no trainable tensor."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    prepared = prepared_for(model)
    if prepared is None or not prepared.sharded_names or prepared.plan.fsdp_version != 1:
        return []
    wrapped = [
        (f"{canonical(name)}.", module)
        for name, module in unwrap(model).named_modules()
        if isinstance(module, FullyShardedDataParallel)
    ]
    return [module for prefix, module in wrapped if any(name.startswith(prefix) for name in prepared.sharded_names)]


def names_of(module: nn.Module, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
    """What stands for the state dict of a unit where only its keys are asked for."""
    named = (*module.named_parameters(), *module.named_buffers())
    return {canonical(name): tensor for name, tensor in named}


def empty_like_sharded(prepared: Prepared) -> dict[str, torch.Tensor]:
    """Empty tensors in the place of the sharded ones, by canonical name; no rank has to take part."""
    import torch

    return {
        item.tensor.name: torch.empty(item.tensor.shape, dtype=getattr(torch, item.tensor.dtype))
        for item in prepared.plan.sharded
    }


def under_all_names(prepared: Prepared, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors by all the names that a state dict has for them.

    A module with tied embeddings is a child of several others, as trainable tokens are. An inventory has it once.

    Args:
        prepared: record of the model.
        named: tensors by first canonical name; those that FSDP does not shard are left out.
    """
    together: dict[int, list[str]] = {}
    for name, parameter in prepared.model().named_parameters(remove_duplicate=False) if named else ():
        together.setdefault(id(parameter), []).append(canonical(name))
    further = {name: names for names in together.values() if len(names) > 1 for name in names}
    return {
        alias: named[item.tensor.name]
        for item in prepared.plan.sharded
        if item.tensor.name in named
        for alias in (*item.tensor.names, *further.get(item.tensor.name, ()))
    }


def scatter(model: nn.Module, prepared: Prepared, values: dict[str, torch.Tensor]) -> None:
    """Give each rank its part of the values that rank 0 has read; every rank takes part.

    Args:
        model: as prepared by accelerate.
        prepared: its record.
        values: by canonical name; rank 0 has all that are sharded, or none.
    """
    import torch

    if not prepared.sharded_names or not agreement.from_main(bool(values), "load of a checkpoint"):
        return
    with torch.no_grad(), _summoned(model, writeback=True):
        for name, tensor in _named(model, prepared):
            shard = cast("DTensor", tensor) if isinstance(tensor, inventory.dtensor()) else None
            local = tensor if shard is None else shard.to_local()
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=local.device)
            if name in values:
                value.copy_(values[name])
            collectives.broadcast([value])
            if shard is not None:
                # Every rank has all of it now, so each takes its part without another collective.
                local.copy_(part(shard, value))
            else:
                tensor.copy_(value)


def part(tensor: DTensor, value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a full value that every rank has, laid out as a sharded tensor; all take part.

    Args:
        tensor: the sharded one.
        value: full, of the same shape.
    """
    from torch.distributed.tensor import distribute_tensor

    # until torch 2.7: rank 0 hands the parts out, where each could take its own
    alone: dict[str, int | None] = {"src_data_rank": None} if versions.at_least("torch", "2.7.0") else {}
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, **alone).to_local()


def _named(model: nn.Module, prepared: Prepared) -> list[tuple[str, torch.Tensor]]:
    """In the order of the plan, which all ranks share."""
    wanted = set(prepared.sharded_names)
    sharded = {
        canonical(name): tensor
        for name, tensor in unwrap(model).named_parameters(remove_duplicate=False)
        if canonical(name) in wanted
    }
    return [(name, sharded[name]) for name in prepared.sharded_names if name in sharded]


def make_root(model: nn.Module) -> None:
    """Have FSDP1 know its root. The first unit that is summoned becomes one for good, so the real one comes first.

    Args:
        model: wrapped by FSDP1.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    if getattr(model, "_is_root", None) is None:
        with FullyShardedDataParallel.summon_full_params(model, recurse=False, writeback=False):
            pass


@contextlib.contextmanager
def _summoned(model: nn.Module, *, writeback: bool) -> Iterator[None]:
    """Summon the full parameters of FSDP1's units that train something; FSDP2 needs no such thing."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    summon = FullyShardedDataParallel.summon_full_params
    units = own_units(model)
    if units:
        make_root(model)
    with contextlib.ExitStack() as stack:
        for module in units:
            stack.enter_context(summon(module, recurse=False, writeback=writeback))
        yield
