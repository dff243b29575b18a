"""Resume checkpoints of a planned model: the adapter goes in and comes back, bit for bit, on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_fsdp_patch.errors import AdapterError
from trainer_fsdp_patch.files import reading, verify
from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.names import file_key, unwrap
from trainer_fsdp_patch.planning.prepared import Prepared, prepared_by, prepared_for
from trainer_fsdp_patch.ranks import agreement, collectives
from trainer_fsdp_patch.saving import adapter_state, gathering

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.checkpoint.state_dict import StateDictOptions
    from transformers import Trainer


@dataclass
class LoadState:
    """What a Trainer's load of a checkpoint has come to on this rank.

    Attributes:
        prepared: of the model that is loaded.
        failure: why this rank refused the checkpoint, or "".
        read: what it has read of sharded tensors, by name.
    """

    prepared: Prepared
    failure: str = ""
    read: dict[str, torch.Tensor] = field(default_factory=dict)


_LOADING: ContextVar[LoadState | None] = ContextVar("_LOADING", default=None)
"""The load that a Trainer is in, whose errors all ranks raise together."""


def model_state_dict(
    upstream: Callable[..., dict[str, torch.Tensor]],
    model: nn.Module,
    adapter_only: bool = False,
    sd_options: StateDictOptions | None = None,
    *,
    full_by_canonical_name: bool = False,
) -> dict[str, torch.Tensor]:
    """The model part of a resume checkpoint: the adapter, full on every rank.

    Args:
        upstream: accelerate's own; it is asked for what is more than the adapter.
        model: as prepared by accelerate, planned.
        adapter_only: whether frozen base weights are left out.
        sd_options: torch's StateDictOptions under FSDP2 since accelerate 1.7, or None.
        full_by_canonical_name: whether this release of accelerate reads full FSDP2 checkpoints by the names of the
            model's state dict. Others do so by those of an adapter file.

    Returns:
        Copies on the CPU, by names that the same release reads without us.
    """
    options = {} if sd_options is None else {"sd_options": sd_options}
    prepared = prepared_for(model) if adapter_only else None
    if prepared is None:
        return upstream(model, adapter_only=adapter_only, **options)
    if prepared.plan.fsdp_version == 2 and sd_options is None:
        # until accelerate 1.7: it hands FSDP2 checkpoints to torch, which refuses one without the base
        return upstream(model, adapter_only=False)
    full = getattr(sd_options, "full_state_dict", False)
    live = adapter_state.live(model, prepared)
    return adapter_state.on_cpu(names(model, live, as_peft=not (full and full_by_canonical_name)))


def names(model: nn.Module, live: dict[str, torch.Tensor], *, as_peft: bool) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the names that a resume checkpoint has for them.

    Args:
        model: as prepared by accelerate.
        live: the tensors by the names of the model's state dict.
        as_peft: by the keys of the active adapter's file, and by canonical names where that has no place.
    """
    if not as_peft:
        return live
    unwrapped = unwrap(model)
    # peft may hand out detached tensors, which share the memory of the live one: their address tells which it is.
    here = {_storage_key(tensor): tensor for tensor in live.values()}
    active = getattr(unwrapped, "active_adapter", None)
    written = adapter_state.keys(unwrapped, live).get(str(active[0] if isinstance(active, list) else active), {})
    by_key = {key: here[_storage_key(tensor)] for key, tensor in written.items() if _storage_key(tensor) in here}
    covered = {id(tensor) for tensor in by_key.values()}
    return by_key | {name: tensor for name, tensor in live.items() if id(tensor) not in covered}


def _storage_key(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], torch.dtype]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.dtype


def load_model_state_dict(
    upstream: Callable[..., object],
    model: nn.Module,
    state_dict: dict[str, torch.Tensor],
    adapter_only: bool = False,
    sd_options: StateDictOptions | None = None,
) -> object:
    """Read the model part of a resume checkpoint into the replicated adapter; nothing is half read.

    Args:
        upstream: accelerate's own; it is asked for what is more than the adapter.
        model: as prepared by accelerate, planned.
        state_dict: by keys of an adapter file or by canonical names; empty on ranks that get it from rank 0.
        adapter_only: whether frozen base weights are left out.
        sd_options: as for `model_state_dict`.

    Raises:
        AdapterError: a tensor is missing, foreign, or the shard of one rank. During a Trainer's load it is raised by
            `load` on all ranks.
    """
    prepared = prepared_for(model) if adapter_only else None
    if prepared is None:
        options = {} if sd_options is None else {"sd_options": sd_options}
        return upstream(model, state_dict, adapter_only=adapter_only, **options)
    if not state_dict:
        return None
    state = _LOADING.get()
    if state is None or state.prepared is not prepared:
        state = None
    if prepared.sharded_names and state is None:
        raise _refused(prepared.sharded_names[0], "is sharded, and was asked for by Accelerator.load_state")
    try:
        _copy_in(model, prepared, state_dict, {} if state is None else state.read)
    except AdapterError as error:
        if state is None:
            raise
        state.failure = str(error)
    return None


def _copy_in(
    model: nn.Module, prepared: Prepared, state_dict: dict[str, torch.Tensor], read: dict[str, torch.Tensor]
) -> None:
    """Copy what is replicated, and keep what is sharded in `read`."""
    import torch

    empty = gathering.empty_like_sharded(prepared)
    live = adapter_state.persistent(model, prepared.of_adapter()) | gathering.under_all_names(prepared, empty)
    known = names(model, live, as_peft=True) | names(model, live, as_peft=False)
    sharded = {id(tensor): name for name, tensor in empty.items()}
    others = {slot.name for slot in inventory.named_tensors(unwrap(model))}
    values = {}
    for key, value in state_dict.items():
        tensor = known.get(key)
        if tensor is None and _belongs(key, others):
            continue
        if tensor is None:
            raise _refused(key, "in the checkpoint, but not in this adapter")
        if isinstance(value, inventory.dtensor()) or value.shape != tensor.shape:
            # https://github.com/huggingface/accelerate/pull/4206
            shapes = f"of shape {list(value.shape)} instead of {list(tensor.shape)}"
            raise _refused(key, f"{shapes}, or the shard of one rank")
        values[id(tensor)] = (tensor, value)
    trained = {id(tensor) for tensor in live.values() if tensor.requires_grad} | sharded.keys()
    missing = {id(tensor): name for name, tensor in known.items() if id(tensor) in trained - values.keys()}
    if missing:
        raise _refused(next(iter(missing.values())), f"not in the checkpoint, as {len(missing) - 1} more tensors")
    with torch.no_grad():
        for place, (tensor, value) in values.items():
            if place in sharded:
                read[sharded[place]] = value
            else:
                tensor.copy_(value)


def _belongs(key: str, names: set[str]) -> bool:
    """Whether a key is a tensor of the model, or below one as a quantized weight's statistics are."""
    parts = key.split(".")
    return any(".".join(parts[:end]) in names for end in range(len(parts), 0, -1))


def _refused(name: str, found: str) -> AdapterError:
    return AdapterError(
        name,
        found,
        "Nothing was loaded: the run would go on from another adapter than the one that was saved",
        "Resume with the adapter configuration that wrote the checkpoint, or from another checkpoint",
        tensor=name,
    )


def load(upstream: Callable[[], object], trainer: Trainer, folder: str) -> object:
    """Load a checkpoint of a Trainer: afterwards every rank has the adapter that rank 0 has read.

    Args:
        upstream: loads it. It is not asked where the folder holds an adapter and nothing to resume from, as
            `save_only_model` leaves it.
        trainer: whose model is loaded.
        folder: of the checkpoint.

    Raises:
        AdapterError: on all ranks, where the checkpoint is not complete or one rank refused what it read.
    """
    prepared = prepared_by(trainer)
    assert prepared is not None
    where = Path(folder)
    # What other machines' disks lack is not theirs to read.
    lacks = verify.unfinished(where)[:1] if trainer.is_world_process_zero() else []
    lacks = agreement.from_main(lacks, "load of a checkpoint")
    result = None
    with _loading(prepared, trainer.model, trainer.accelerator.device) as state:
        if lacks:
            state.failure = str(_refused(str(where), f"not complete: {lacks[0]}"))
        elif (where / reading.FSDP_FULL).is_file() and _below_compile(trainer.model, prepared):
            load_model_state_dict(upstream, trainer.model, reading.read_tensors(where / reading.FSDP_FULL), True)
        elif verify.is_ours(where) or not reading.adapter_folders(where):
            result = upstream()
        else:
            load_model_state_dict(upstream, trainer.model, _of_files(trainer.model, prepared, where), True)
    return result


def _below_compile(model: nn.Module, prepared: Prepared) -> bool:
    """Whether accelerate would have rank 0 alone read, and wait for ranks that went on."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return prepared.plan.fsdp_version == 1 and type(model) is not FullyShardedDataParallel


def _of_files(model: nn.Module, prepared: Prepared, folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of adapter files by canonical names of the model."""
    unwrapped = unwrap(model)
    empty = gathering.under_all_names(prepared, gathering.empty_like_sharded(prepared))
    live = adapter_state.persistent(model, prepared.of_adapter()) | empty
    places = {_storage_key(tensor): name for name, tensor in live.items()}
    tensors: dict[str, torch.Tensor] = {}
    for adapter in getattr(unwrapped, "peft_config", {}):
        file = reading.adapter_file(folder if adapter == "default" else folder / adapter)
        if file is None:
            continue
        # transformers keeps the names of its own model, to which a file has peft's prefix.
        own = {f"base_model.model.{file_key(name, adapter)}": name for name in live if adapter in name.split(".")}
        written = adapter_state.keys(unwrapped, live).get(adapter, {})
        named = own | {key: places[_storage_key(item)] for key, item in written.items() if _storage_key(item) in places}
        tensors |= {named.get(key, key): tensor for key, tensor in reading.read_tensors(file).items()}
    return tensors


@contextlib.contextmanager
def _loading(prepared: Prepared, model: nn.Module, device: torch.device) -> Iterator[LoadState]:
    """Around a load: all ranks raise what one of them raised, or have what rank 0 has read."""
    state = LoadState(prepared)
    token = _LOADING.set(state)
    own: Exception | None = None
    try:
        yield state
    except AdapterError as error:
        state.failure = str(error)
    except Exception as error:
        own, state.failure = error, f"{type(error).__name__}: {error}"
    finally:
        _LOADING.reset(token)
    failed = agreement.first_failure(state.failure, device, "load of a checkpoint")
    if own is not None:
        raise own
    if failed is not None:
        raise AdapterError(failed[1])
    # until accelerate 1.9: a full FSDP2 checkpoint is read on rank 0 only
    adapter = prepared.of_adapter()
    collectives.broadcast(adapter.values())
    agreement.compare(list(adapter), list(adapter.values()), "after a checkpoint was loaded")
    gathering.scatter(model, prepared, state.read)
