"""What is written as the adapter: gathered, compared across ranks and proven before an old file is replaced."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from trainer_fsdp_patch.errors import AdapterError, warn
from trainer_fsdp_patch.files import verify
from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.names import canonical, unwrap
from trainer_fsdp_patch.packing import state_dict as packing
from trainer_fsdp_patch.planning.prepared import Prepared, prepared_by, prepared_for
from trainer_fsdp_patch.ranks import agreement, collectives
from trainer_fsdp_patch.saving import embeddings, gathering, liveness, naming
from trainer_fsdp_patch.shadowing import shadowed

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn
    from transformers import Trainer

_SAVED: ContextVar[Prepared | None] = ContextVar("_SAVED", default=None)
"""The model that a Trainer saves without its base."""

_EXPECTED: weakref.WeakKeyDictionary[Prepared, dict[str, set[str]]] = weakref.WeakKeyDictionary()
"""Keys of each adapter's file."""


@contextlib.contextmanager
def gathered(model: nn.Module, given: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """Let a planned model answer `state_dict()` with what the ranks have gathered already.

    Args:
        model: unwrapped.
        given: what its save was given, or None.
    """
    if given is None or prepared_for(model) is None:
        yield
        return
    with shadowed(model, state_dict=lambda *args, **kwargs: dict(given)):
        yield


@contextlib.contextmanager
def saving(trainer: Trainer) -> Iterator[None]:
    """Around a Trainer's save of the adapter alone: what is gathered inside is the adapter, and the base is not.

    The answer stays full where somebody may want more of it. A model with an adapter as a part of it is written tensor
    by tensor. A user may have a `_save` of their own.

    Args:
        trainer: with a planned model.
    """
    prepared = prepared_by(trainer)
    alone = inventory.is_saved_alone(unwrap(trainer.model))
    own = getattr(type(trainer)._save, "__module__", "").partition(".")[0] != "transformers"
    token = _SAVED.set(prepared if alone and not own else None)
    try:
        yield
    finally:
        _SAVED.reset(token)


def state_dict(
    upstream: Callable[[], dict[str, torch.Tensor]], accelerator: Accelerator, model: nn.Module
) -> dict[str, torch.Tensor]:
    """The state dict of a planned model, or before training of one that is to be planned.

    Args:
        upstream: accelerate's own, with its arguments.
        accelerator: the run's.
        model: as wrapped by FSDP.

    Returns:
        Tensors on the CPU by canonical name. They are all of the model's, on rank 0, as upstream promises. Inside our
        own save of the adapter alone they are what its file may take, on all ranks.

    Raises:
        AdapterError: on all ranks, where ranks differ. Inside our own save also where a value is not finite or a tensor
            is missing.
    """
    prepared = prepared_for(model)
    if prepared is None:
        # Before train() there is nothing to gather, and FSDP1 fails where it has no unit.
        return model.state_dict()
    if _SAVED.get() is not prepared:
        return _everything(upstream, accelerator, model, prepared)
    return _adapter(accelerator, model, prepared)


def _everything(
    upstream: Callable[[], dict[str, torch.Tensor]], accelerator: Accelerator, model: nn.Module, prepared: Prepared
) -> dict[str, torch.Tensor]:
    """What upstream gives. FSDP2 loses its way in layers that keep more in a state dict than tensors, as 8-bit ones."""
    if prepared.plan.fsdp_version == 1:
        everything = upstream()
        # FSDP1 neither moves what it ignores to the CPU, nor leaves it out where it gives nothing else.
        values = on_cpu(packing.as_saved(model, everything)) if getattr(model, "rank", 0) == 0 else {}
        everything.clear()
        everything.update(values)
        return everything
    if inventory.QUANTIZED not in prepared.roles.values() and not prepared.plan.packed:
        return upstream()
    everything = {}
    for name, value in model.state_dict().items():
        with collectives.collective("gathering of the model"):
            full = value.full_tensor() if isinstance(value, inventory.dtensor()) else value
        if accelerator.is_main_process:
            everything[canonical(name)] = full.detach().cpu() if hasattr(full, "detach") else full
    return packing.as_saved(model, everything)


def _adapter(accelerator: Accelerator, model: nn.Module, prepared: Prepared) -> dict[str, torch.Tensor]:
    """What an adapter's file may take its tensors from.

    The adapter is full on every rank, so no collective gathers the frozen base. Only the embeddings are gathered, for
    peft writes them next to an adapter that targets or resizes them.
    """
    adapter = prepared.of_adapter()
    agreement.compare(list(adapter), list(adapter.values()), "before saving")
    gathered = gathering.full_tensors(model, prepared)
    refuse_dead(adapter | gathered)
    liveness.of(prepared).warn_unmoved()
    tensors = on_cpu(
        persistent(model, adapter) | gathering.under_all_names(prepared, gathering.in_stored_dtype(prepared, gathered))
    )
    tensors |= on_cpu(added(unwrap(model), prepared))
    prove(unwrap(model), tensors, prepared)
    if accelerator.is_main_process:
        warn_of_shards(tensors)
    tensors.update(embeddings.full_weights(model, set(tensors), kept=accelerator.is_main_process))
    return tensors


def added(model: nn.Module, prepared: Prepared) -> dict[str, torch.Tensor]:
    """Tensors of adapters that came after the plan: a reference that a callback loads, the best of several files.

    They may require gradients, for `set_adapter` asks for these. None was trained: a step that holds one is refused.

    Args:
        model: unwrapped.
        prepared: its record.
    """
    names = set(getattr(model, "peft_config", {})) - expected(prepared).keys()
    return {
        slot.name: slot.tensor
        for slot in (inventory.named_tensors(model) if names else ())
        if slot.owned and not names.isdisjoint(slot.name.split("."))
    }


def on_cpu(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU; a tensor that stands under several names is copied once.

    Args:
        named: tensors, and whatever else a state dict keeps, which stays as it is.
    """
    different = {id(item): item for item in named.values()}
    copies = {key: item.detach().cpu() if hasattr(item, "detach") else item for key, item in different.items()}
    return {name: copies[id(tensor)] for name, tensor in named.items()}


def persistent(model: nn.Module, adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter's tensors under all their names, as a state dict has them: without non-persistent buffers.

    Args:
        model: wrapped or not.
        adapter: tensors of the model by canonical name, each once.
    """
    known = {id(tensor) for tensor in adapter.values()}
    result = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if id(tensor) in known and key not in module._non_persistent_buffers_set:
                result[canonical(f"{prefix}.{key}")] = tensor
    return result


def live(model: nn.Module, prepared: Prepared) -> dict[str, torch.Tensor]:
    """The adapter's tensors under all their names, with what FSDP has sharded of it gathered; every rank takes part.

    Args:
        model: as prepared by accelerate, or before that.
        prepared: its record.
    """
    return persistent(model, prepared.of_adapter()) | gathering.under_all_names(
        prepared, gathering.full_tensors(model, prepared)
    )


def refuse_dead(adapter: dict[str, torch.Tensor]) -> None:
    """Refuse an adapter that cannot be right whatever is written of it.

    Args:
        adapter: its tensors by canonical name, full.

    Raises:
        AdapterError: it has no tensor, or a value that is not finite.
    """
    import torch

    if not adapter:
        raise AdapterError(
            "adapter", "it has no tensor", "Nothing was written", "Check that the adapter is still attached"
        )
    floats = {name: tensor.detach() for name, tensor in adapter.items() if tensor.is_floating_point()}
    # A sum is finite only if all values are, unless it overflows: then the values are looked at.
    sums = [tensor.sum(dtype=torch.float32) for tensor in floats.values()]
    if not sums or bool(torch.isfinite(torch.stack(sums)).all()):
        return
    for name, tensor in floats.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                name,
                f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values are not finite",
                "Nothing was written, and the file of an earlier save is untouched",
                "Go back to the last good checkpoint and lower the learning rate or clip gradients",
                tensor=name,
            )


def warn_of_shards(tensors: dict[str, torch.Tensor]) -> None:
    """Say where an adapter has the rows of one rank only. A run that began with such a file would hand it on.

    Args:
        tensors: what is about to be saved, by canonical name.
    """
    for key, _, text in verify.one_rank(tensors):
        warn(
            key,
            text,
            "It is written as it is, for that is what was trained",
            "If the run began with a saved adapter, `python -m trainer_fsdp_patch verify` that one",
        )


def keys(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """What peft would write of a state dict, by adapter; {} for models that keep adapters in another way.

    Args:
        model: unwrapped.
        tensors: state dict of the model, or the part that adapters may take, by canonical name.
    """
    from peft.utils.save_and_load import get_peft_model_state_dict

    options = {"state_dict": tensors, "save_embedding_layers": False}
    return {
        adapter: naming.call_with_canonical_names(get_peft_model_state_dict, model, adapter_name=adapter, **options)
        for adapter in getattr(model, "peft_config", {})
    }


def note_keys(prepared: Prepared, entries: dict[str, dict[str, torch.Tensor]]) -> None:
    """Keep which keys the file of each adapter has to have.

    Args:
        prepared: record of the model.
        entries: what peft writes, by adapter and key.
    """
    _EXPECTED[prepared] = {adapter: set(entry) for adapter, entry in entries.items()}


def expected(prepared: Prepared) -> dict[str, set[str]]:
    """The keys that the file of each adapter has to have."""
    return _EXPECTED.get(prepared, {})


def expect(model: nn.Module, prepared: Prepared) -> None:
    """Note before wrapping which keys a save has to have, and warn of what trains without being saved.

    Args:
        model: unwrapped, before FSDP wraps it.
        prepared: its record.
    """
    tensors = live(model, prepared)
    entries = keys(model, tensors)
    note_keys(prepared, entries)
    written = {id(tensor) for entry in entries.values() for tensor in entry.values()}
    for item in (*prepared.plan.ignored, *prepared.plan.sharded):
        names = [name for name in item.tensor.names if name in tensors]
        lost = item.tensor.role == inventory.ADAPTER and not item.tensor.owned
        if entries and lost and not any(id(tensors[name]) in written for name in names):
            warn(
                item.tensor.name,
                "trainable, but part of no adapter",
                "It is trained and averaged, and peft does not write it into the adapter file",
                "Add its module to modules_to_save, or freeze it",
            )


def prove(model: nn.Module, tensors: dict[str, torch.Tensor], prepared: Prepared) -> None:
    """Check that peft would write from a state dict what it would have written before wrapping.

    Args:
        model: unwrapped.
        tensors: what is about to be saved, by canonical name.
        prepared: record of the model.

    Raises:
        AdapterError: on all ranks, naming the first key that is missing or too much.
    """
    for adapter, entry in keys(model, tensors).items():
        if adapter not in expected(prepared):
            continue
        differing = sorted(set(entry) ^ expected(prepared)[adapter])
        if differing:
            raise AdapterError(
                differing[0],
                f"{'not expected' if differing[0] in entry else 'missing'} in the file of adapter {adapter!r}, "
                f"as {len(differing) - 1} more keys",
                "Nothing was written, and the file of an earlier save is untouched",
                "Report this with the versions that `python -m trainer_fsdp_patch status` prints",
                tensor=differing[0],
            )


def save_sharded(trainer: Trainer, folder: str | None) -> None:
    """Write the adapter file where the Trainer writes none, under SHARDED_STATE_DICT; also before `train()`.

    Args:
        trainer: under FSDP or not.
        folder: where the file belongs; None is the Trainer's output_dir.

    https://github.com/huggingface/transformers/issues/30491
    """
    if not trainer.is_fsdp_enabled:
        return
    if prepared_by(trainer) is None and not inventory.is_unwrapped_adapter(trainer.model):
        return
    if "FULL_STATE_DICT" not in str(trainer.accelerator.state.fsdp_plugin.state_dict_type):
        tensors = trainer.accelerator.get_state_dict(trainer.model)
        if trainer.args.should_save:
            trainer._save(trainer.args.output_dir if folder is None else folder, state_dict=tensors)
