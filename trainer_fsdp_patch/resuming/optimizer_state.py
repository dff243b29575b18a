"""Sharded checkpoints of an optimizer: a fresh one gets the state that they are read into, by their names."""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_fsdp_patch.files import reading
from trainer_fsdp_patch.names import canonical
from trainer_fsdp_patch.planning.prepared import prepared_by

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor
    from transformers import Trainer

    Answer = Callable[[], Mapping[str, object]]

_STATE = "optimizer.state."
"""What the keys of a state begin with in a sharded checkpoint."""

_NAMED: ContextVar[tuple[torch.optim.Optimizer, Answer] | None] = ContextVar("_NAMED", default=None)
"""The optimizer that is about to be read, and what it answers by name."""


@contextlib.contextmanager
def initialized_optimizer(trainer: Trainer, folder: str | None) -> Iterator[None]:
    """Give a fresh optimizer the state that a sharded checkpoint is read into; without it nothing is read.

    Args:
        trainer: whose optimizer is about to be loaded.
        folder: of the checkpoint, or None where the run starts anew.
    """
    prepared = prepared_by(trainer)
    if folder is None or prepared is None or prepared.native:
        yield
        return
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    sharded = "SHARDED" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
    if not sharded or optimizer is None or optimizer.state:
        yield
        return
    _take_empty_step(optimizer)
    _forget_unreached(trainer.model, optimizer, Path(folder) / reading.FSDP_OPTIMIZER)
    made = optimizer.state
    token = _NAMED.set((trainer.optimizer, functools.partial(_named_state, trainer.model, optimizer)))
    try:
        yield
    finally:
        _NAMED.reset(token)
        vars(trainer.optimizer).pop("state_dict", None)
    if optimizer.state is made:
        # Nothing was read, and a counter that says one step was taken would bend the first real one.
        made.clear()
    # until accelerate 1.7
    for state in optimizer.state.values():
        state.update({key: _full_tensor(value) for key, value in state.items() if hasattr(value, "local_shards")})


def _forget_unreached(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Take the state off parameters that a checkpoint has none of: no batch had reached them, and torch misses it."""
    try:
        keys = reading.index(folder).state_dict_metadata
    except (OSError, pickle.UnpicklingError):
        # Whoever reads it says what is wrong with it.
        return
    stems = {key[len(_STATE) :].rpartition(".")[0] for key in keys if key.startswith(_STATE)}
    named = {canonical(name): parameter for name, parameter in model.named_parameters()}
    # Some releases of accelerate name states by numbers.
    for name in named.keys() - stems if not stems.isdisjoint(named) else ():
        optimizer.state.pop(named[name], None)


def _full_tensor(sharded: ShardedTensor) -> torch.Tensor:
    """One tensor of what FSDP1 releases before accelerate 1.7 read in parts, each rank its own, also for replicas."""
    import torch
    import torch.distributed as dist

    shards = sharded.local_shards()
    device = shards[0].tensor.device if shards else sharded.device
    full = torch.zeros(sharded.size(), dtype=sharded.dtype, device=device)
    for shard in shards:
        places = zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
        full[tuple(slice(start, start + size) for start, size in places)] = shard.tensor
    dist.all_reduce(full)
    return full


def answer_by_name() -> None:
    """Let the optimizer that is about to be read answer by the names that a sharded checkpoint has, once.

    Releases of accelerate that save by parameter name and load by parameter number ask it first.
    """
    named = _NAMED.get()
    if named is None:
        return
    optimizer, answer = named
    _NAMED.set(None)

    def state_dict() -> Mapping[str, object]:
        del vars(optimizer)["state_dict"]
        return answer()

    vars(optimizer)["state_dict"] = state_dict


def _named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Mapping[str, object]:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return FullyShardedDataParallel.optim_state_dict(model, optimizer)
    return get_optimizer_state_dict(model, optimizer)


def _take_empty_step(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer allocate its state and leave every parameter as it is."""
    import torch

    # A rate of zero leaves parameters alone, decoupled decay included. What is read replaces the moments.
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [item for group in optimizer.param_groups for item in group["params"] if item.requires_grad]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for parameter in parameters:
            parameter.grad = None
