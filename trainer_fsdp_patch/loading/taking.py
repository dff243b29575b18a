"""A planned run takes over a base that one rank of a machine has loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch.inspecting.inventory import Inventory
from trainer_fsdp_patch.loading import restoring, streaming
from trainer_fsdp_patch.packing import choosing
from trainer_fsdp_patch.packing.packed import packed_layers

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

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
    if layers and not _hands_out(prepared, accelerator):
        restoring.fill([record.layer for record in packed_layers(model)], accelerator.device)


def _hands_out(prepared: Prepared, accelerator: Accelerator) -> bool:
    """Whether FSDP gives each rank rank 0's bytes of what it shards."""
    plugin = accelerator.state.fsdp_plugin
    if prepared.plan.fsdp_version == 1:
        return bool(plugin.sync_module_states)
    # accelerate has every rank load a base with 4-bit weights that FSDP sees.
    ignored = {id(tensor) for tensor in prepared.tensors}
    seen = (item for item in prepared.model().parameters() if id(item) not in ignored)
    return bool(plugin.cpu_ram_efficient_loading) and not any(type(item).__name__ == "Params4bit" for item in seen)
