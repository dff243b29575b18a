"""A layer is full while an adapter is merged into it or taken out. Its shards hold the result.

peft adds to `weight.data`, and a rank has a part of that. One layer is gathered at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.names import PACKED
from trainer_fsdp_patch.packing.packed import packed_of
from trainer_fsdp_patch.planning.prepared import Prepared, prepared_with
from trainer_fsdp_patch.ranks import collectives
from trainer_fsdp_patch.saving import gathering

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.fsdp import FullyShardedDataParallel


@contextlib.contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """Around a change of a layer's weights in place, by all ranks alike.

    Args:
        layer: of a planned model.
    """
    prepared = prepared_with(layer)
    assert prepared is not None
    context = _full_views(layer, prepared) if prepared.plan.fsdp_version == 1 else _full_tensors(layer, prepared)
    with context:
        yield


@contextlib.contextmanager
def _full_tensors(layer: nn.Module, prepared: Prepared) -> Iterator[None]:
    """FSDP2: plain parameters stand in the place of sharded ones."""
    import torch

    for unit in prepared.model().modules():
        # The root keeps its parameters full after a forward, and what is written to those is lost.
        if hasattr(unit, "_get_fsdp_state") and any(module is layer for module in unit.modules()):
            unit.reshard()
    held = []
    for module in layer.modules():
        for key, parameter in module._parameters.items():
            if isinstance(parameter, inventory.dtensor()):
                with collectives.collective("gathering of a layer"):
                    full = parameter.full_tensor().detach()
                held.append((module, key, parameter, torch.nn.Parameter(full, requires_grad=parameter.requires_grad)))
    with contextlib.ExitStack() as stack:
        # Put in place once all are gathered: a collective that fails leaves the layer as it was.
        for module, key, _, full in held:
            record = packed_of(module) if key == PACKED else None
            if record is not None:
                stack.enter_context(record.reading(full.data.view(torch.uint8)))
            module._parameters[key] = full
        try:
            yield
        finally:
            for module, key, parameter, full in held:
                module._parameters[key] = parameter
                # What a quantizer has merged into is a new weight of its own, and the packed bytes are as they were.
                if key != PACKED:
                    with torch.no_grad():
                        parameter.to_local().copy_(gathering.part(parameter, full.data))


@contextlib.contextmanager
def _full_views(layer: nn.Module, prepared: Prepared) -> Iterator[None]:
    """FSDP1: the unit's full parameters are summoned, where the user has not done so, and written back."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    unit = _unit_of(layer, prepared)
    if unit is None or unit._handle is None or not unit._handle.is_sharded(unit._handle.flat_param):
        yield
        return
    gathering.make_root(prepared.wrapped())
    with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=True):
        views = [(item, item.data) for item in layer.parameters()]
        yield
        for parameter, view in views:
            # FSDP1 writes back its own flat tensor, and another `data` is no part of it.
            if parameter.data.data_ptr() != view.data_ptr():
                view.copy_(parameter.data)
                parameter.data = view


def _unit_of(layer: nn.Module, prepared: Prepared) -> FullyShardedDataParallel | None:
    """FSDP1's innermost unit around a layer."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    innermost = None
    for module in prepared.wrapped().modules():
        # Outer modules come first.
        if isinstance(module, FullyShardedDataParallel) and any(part is layer for part in module.modules()):
            innermost = module
    return innermost
