"""Lets FSDP1 shard quantized layers whole: their tensors are views of a unit's bytes while it is gathered.

Area: Start-up
Issue: https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1709
Can be removed when: FSDP1 shards integer tensors and what quantizers keep next to a weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.packing import units
from trainer_fsdp_patch.patching.registry import Patch

if TYPE_CHECKING:
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="torch>=2.2.dev0", target="torch.distributed.fsdp._flat_param")


@patch.wrap("FlatParamHandle.unshard", "self", only=gates.packed_unit)
def show_layers(wrapped: Wrapped, instance: FlatParamHandle, args: Args, kwargs: Kwargs) -> object:
    """Point a quantizer's tensors at the bytes that have been gathered."""
    result = wrapped(*args, **kwargs)
    units.show_flat(instance)
    return result


@patch.wrap("FlatParamHandle.reshard", "self", "free_unsharded_flat_param", only=gates.packed_unit)
def hide_layers(wrapped: Wrapped, instance: FlatParamHandle, args: Args, kwargs: Kwargs) -> object:
    """Put stand-ins in their places before the memory is freed."""
    units.hide_flat(instance)
    return wrapped(*args, **kwargs)
