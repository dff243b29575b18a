"""Applies a plan to a model in the Trainer's hands, and keeps what later steps need to know of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from trainer_fsdp_patch.adapting import residents
from trainer_fsdp_patch.announcing import figures, start
from trainer_fsdp_patch.errors import AdapterError, PlanError
from trainer_fsdp_patch.inspecting import elementwise, inventory, sharing
from trainer_fsdp_patch.loading import base_weights, taking
from trainer_fsdp_patch.measuring import memory
from trainer_fsdp_patch.packing import choosing
from trainer_fsdp_patch.planning import budget, residence
from trainer_fsdp_patch.planning.plan import make_plan
from trainer_fsdp_patch.planning.prepared import Prepared, keep, prepared_for
from trainer_fsdp_patch.preparing import fsdp_plugin, later
from trainer_fsdp_patch.ranks import agreement, collectives
from trainer_fsdp_patch.saving import adapter_state
from trainer_fsdp_patch.training import optimizer_groups, steps

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn
    from torch._C._distributed_c10d import ProcessGroup
    from transformers import Trainer

_LOCAL = {"auto_mapping", "base_model_name_or_path", "revision"}
"""Entries of an adapter's configuration that may differ between machines."""


def prepare(trainer: Trainer, model: nn.Module, *, training: bool = False) -> Prepared | None:
    """Plan and apply, once for each model, before accelerate wraps it.

    Args:
        trainer: a Trainer under FSDP, or one whose base transformers has sharded.
        model: the model that accelerate is about to prepare, with an adapter.
        training: whether it is about to be trained, maybe again, with adapters that came since.

    Returns:
        The prepared model's record, or None where the patches stand back.

    Raises:
        PlanError: the model is wrapped already, or a setting contradicts the plan.
        AdapterError: the ranks do not hold the same adapter.
    """
    native = not trainer.is_fsdp_enabled
    accelerator = trainer.accelerator
    prepared = prepared_for(model)
    if prepared is not None and model is not prepared.model() and model not in accelerator._models:
        # train() forgets what an evaluation has prepared, and gradients are averaged for what is known.
        accelerator._models.append(model)
    if prepared is not None:
        if training:
            later.take_up(prepared, accelerator.device)
            _tell(trainer, prepared)
        return prepared
    if not native:
        refuse_wrapped(model)
    figures.asked()
    taken = inventory.take(model)
    if native:
        why = "transformers has sharded the base, and shards no adapter"
        plan = make_plan(model, mixed_precision=accelerator.mixed_precision, unsharded=why, inventory=taken)
        prepared = settle(accelerator, Prepared(model, plan, [None], taken, native=True), taken)
        return _tell(trainer, prepared) if training else prepared
    plugin = accelerator.state.fsdp_plugin
    fsdp_plugin.warn_of_flag(plugin, trainer.args.fsdp_config or {})
    explicit = fsdp_plugin.explicit_policy(accelerator, plugin)
    why = elementwise.why_not(trainer, sharing.version_of(plugin), budget.settings.adapter_placement)
    room = None
    if residence.asked(None, budget.settings.base_budget) == residence.AUTO:
        room = memory.least(memory.room(model, accelerator.device, trainer.args), accelerator.device)
    plan = fsdp_plugin.plan_for(model, accelerator, plugin, explicit, why, taken, room)
    prepared = settle(accelerator, Prepared(model, plan, data_parallel_groups(accelerator), taken), taken)
    fsdp_plugin.set_flags(prepared, plugin, explicit)
    if room is not None and plan.fsdp_version == 2:
        residents.watch(prepared, accelerator.device)
    optimizer_groups.separate(trainer)
    return _tell(trainer, prepared) if training else prepared


def _tell(trainer: Trainer, prepared: Prepared) -> Prepared:
    """Say what the plan is where a training starts, and have the log show it."""
    start.announce(prepared, main=trainer.accelerator.is_main_process)
    figures.watch(trainer, prepared)
    return prepared


def settle(accelerator: Accelerator, prepared: Prepared, taken: inventory.Inventory) -> Prepared:
    """Have all ranks hold the same adapter, and keep the record.

    Args:
        accelerator: the run's.
        prepared: the model's record.
        taken: the model's inventory.

    Raises:
        AdapterError: the ranks do not hold the same adapter.
    """
    with collectives.told():
        return _settle(accelerator, prepared, taken)


def _settle(accelerator: Accelerator, prepared: Prepared, taken: inventory.Inventory) -> Prepared:
    model, plan = prepared.model(), prepared.plan
    agree(prepared, accelerator.device)
    taken = taking.give_replicated(prepared, taken, accelerator.device)
    base_weights.synchronize(prepared, accelerator, taken)
    adapter_state.expect(model, prepared)
    materialize(prepared, accelerator.device, taken)
    if plan.packed:
        choosing.pack_layers(taken.reread(), plan.packed, accelerator.device)
        taking.give_packed(prepared, accelerator)
    steps.watch(prepared, accelerator)
    keep(model, prepared)
    return prepared


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model that FSDP wrapped before we could plan.

    Raises:
        PlanError: its adapter is already inside FSDP's units.
    """
    version = inventory.fsdp_version(model)
    if version:
        raise PlanError(
            type(model).__name__,
            f"already wrapped by FSDP{version} when the Trainer prepares it",
            "Its adapter is inside the units and cannot be taken out",
            "Give the Trainer the unwrapped model and call trainer_fsdp_patch.patch() before training starts",
            setting="model",
        )


def data_parallel_groups(accelerator: Accelerator) -> list[ProcessGroup | None]:
    """Process groups over which gradients are averaged, one for each dimension that FSDP works on.

    Raises:
        PlanError: tensor parallelism splits the adapter itself.
    """
    parallelism = getattr(accelerator, "parallelism_config", None)
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if parallelism is None or mesh is None:
        return [None]
    if getattr(parallelism, "tp_enabled", False):
        raise PlanError(
            "parallelism_config.tp_size",
            f"{parallelism.tp_size} next to FSDP",
            "A replicated adapter next to tensor-parallel layers is not supported",
            "Use tp_size=1, or switch the patches off",
            setting="parallelism_config",
        )
    return [mesh[name].get_group() for name in parallelism.fsdp_dim_names]


def agree(prepared: Prepared, device: torch.device) -> None:
    """Compare the adapter's make-up across ranks before a tensor is moved.

    Args:
        prepared: the model's record.
        device: of the collectives.

    Raises:
        AdapterError: on all ranks, naming the first setting that differs, or the first tensor.
    """
    settings: dict[str, object] = {"base_budget": [home for home, _ in prepared.plan.resident]}
    for adapter, config in getattr(prepared.model(), "peft_config", {}).items():
        values = config.to_dict() if hasattr(config, "to_dict") else vars(config)
        settings |= {f"peft_config[{adapter!r}].{key}": _plain(values[key]) for key in {*values} - _LOCAL}
    tensors = [item.tensor for item in (*prepared.plan.ignored, *prepared.plan.sharded)]
    made = {tensor.name: (tensor.shape, tensor.dtype, tensor.role) for tensor in tensors}
    difference = agreement.first_difference([settings, made], device, "comparison of the adapter's make-up")
    if difference is not None:
        name, rank, here, there = difference
        raise AdapterError(
            name,
            f"{here} on rank 0 and {there} on rank {rank}",
            "One adapter cannot be trained from different ones",
            f"Give every rank the same {'base_budget' if name == 'base_budget' else 'adapter configuration'}",
            tensor=name,
        )


def _plain(value: object) -> str:
    """Text that is the same in every process, whatever the order of sets and the address of objects."""
    return json.dumps(
        value,
        sort_keys=True,
        default=lambda other: sorted(map(str, other)) if isinstance(other, (set, frozenset)) else type(other).__name__,
    )


def materialize(prepared: Prepared, device: torch.device, taken: inventory.Inventory) -> None:
    """Move what FSDP ignores to the device and give every rank rank 0's bits, objects unchanged.

    Quantized layers are moved with their module, which keeps their quantization state, and are not
    broadcast: every rank has loaded the same ones.

    Args:
        prepared: record of the model; it holds the tensors again.
        device: of the rank.
        taken: inventory of the model.
    """
    for slot in taken.slots:
        if prepared.roles.get(slot.name) == inventory.QUANTIZED and slot.tensor.device != device:
            slot.module.to(device)
    taken = taken.reread()
    prepared.hold(taken)
    shared = []
    for name, tensor in zip(prepared.names, prepared.tensors, strict=True):
        if prepared.roles[name] == inventory.QUANTIZED:
            continue
        if tensor.is_meta:
            _give_room(tensor, device)
        elif tensor.device != device:
            tensor.data = tensor.data.to(device)
        shared.append(tensor)
    collectives.broadcast(shared)
    for slot in taken.slots if prepared.sharded_names else ():
        if slot.name in prepared.sharded_names and not slot.tensor.is_meta:
            # One at a time: they are sharded because each rank has no room for all.
            full = slot.tensor.data.to(device)
            collectives.broadcast([full])
            slot.tensor.data.copy_(full)
    adapter = prepared.of_adapter()
    agreement.compare(list(adapter), list(adapter.values()), "after the broadcast")


def _give_room(tensor: torch.Tensor, device: torch.device) -> None:
    """Give a meta tensor room on a device, where rank 0's values go; an optimizer may hold the object already.

    The `data` of a tensor on meta takes none of another device.
    """
    import torch

    room = torch.empty_like(tensor, device=device)
    if isinstance(tensor, torch.nn.Parameter):
        room = torch.nn.Parameter(room, requires_grad=tensor.requires_grad)
    vars(room).update(vars(tensor))
    torch.utils.swap_tensors(tensor, room)  # type: ignore[no-untyped-call]
