"""A planned run takes over a base that one rank of a machine has loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch.inspecting.inventory import Inventory
from trainer_fsdp_patch.loading import restoring, streaming
from trainer_fsdp_patch.packing import choosing
from trainer_fsdp_patch.packing.packed import packed_layers

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

    from trainer_fsdp_patch.planning.prepared import Prepared


def give_replicated(prepared: Prepared, taken: Inventory, device: torch.device) -> Inventory:
    """Give every rank the layers that the plan replicates, or that FSDP shards in the quantizer's own tensors.

    Args:
        prepared: record of a model that is not packed yet.
        taken: its inventory.
        device: of the collectives.

    Returns:
        The inventory, read again where tensors have come.
    """
    if streaming.none_loaded():
        return taken
    layers = choosing.quantized_layers(taken)
    packed = {id(layer) for name, layer in layers.items() if name in prepared.plan.packed}
    waiting = [layer for layer in streaming.loaded(prepared.model()) if id(layer) not in packed]
    restoring.restore(waiting, device)
    return taken.reread() if waiting else taken


def give_packed(prepared: Prepared, accelerator: Accelerator) -> None:
    """Give every rank what FSDP does not hand out of packed layers: tables, and all of it where FSDP hands out none.

    Args:
        prepared: record of the model, whose layers are packed.
        accelerator: the run's.
    """
    model = prepared.model()
    layers = streaming.loaded(model)
    restoring.restore(layers, accelerator.device)
    plugin = accelerator.state.fsdp_plugin
    if layers and prepared.plan.fsdp_version == 1 and plugin.param_init_fn is not None:
        plugin.param_init_fn = _sparing(prepared, plugin.param_init_fn)
    seen = (item for item in model.parameters() if id(item) not in prepared.known)
    if layers and not hands_out(prepared, accelerator, seen):
        restoring.fill([record.layer for record in packed_layers(model)], accelerator.device)


def hands_out(prepared: Prepared, accelerator: Accelerator, seen: Iterable[torch.Tensor]) -> bool:
    """Whether FSDP gives each rank rank 0's bytes of what it shards.

    Args:
        prepared: record of the model.
        accelerator: the run's.
        seen: parameters that FSDP2 finds; accelerate has every rank load a base with 4-bit weights among them.
    """
    plugin = accelerator.state.fsdp_plugin
    if prepared.plan.fsdp_version == 1:
        return bool(plugin.sync_module_states)
    return bool(plugin.cpu_ram_efficient_loading) and not any(type(item).__name__ == "Params4bit" for item in seen)


def _sparing(prepared: Prepared, initialize: Callable[[nn.Module], object]) -> Callable[[nn.Module], object]:
    """The function by which FSDP1 makes room for a unit that is on meta, without what the plan replicates.

    FSDP1 calls it for each module of the unit, those aside that it ignores as modules. It ignores an adapter's tensors.
    """

    def init(module: nn.Module) -> object:
        slots: list[dict[str, Any]] = [module._parameters, module._buffers]
        kept = [(slot, key, value) for slot in slots for key, value in slot.items() if id(value) in prepared.known]
        for slot, key, _ in kept:
            slot[key] = None
        try:
            return initialize(module)
        finally:
            for slot, key, value in kept:
                slot[key] = value

    return init
