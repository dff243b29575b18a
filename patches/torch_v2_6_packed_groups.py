"""Lets FSDP2 shard quantized layers whole: their tensors are views of a group's bytes while it is gathered.

Area: Start-up
Issue: https://github.com/huggingface/accelerate/issues/3983
Can be removed when: FSDP2 shards integer tensors and what quantizers keep next to a weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.packing import units
from trainer_fsdp_patch.patching.registry import Patch

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="torch>=2.6.dev0", target="torch.distributed.fsdp._fully_shard._fsdp_param_group")


@patch.wrap("FSDPParamGroup._to_unsharded", "self", only=gates.packed_unit)
def show_layers(wrapped: Wrapped, instance: FSDPParamGroup, args: Args, kwargs: Kwargs) -> object:
    """Point a quantizer's tensors at the bytes that have been gathered."""
    result = wrapped(*args, **kwargs)
    units.show_group(instance)
    return result


@patch.wrap("FSDPParamGroup._to_sharded", "self", only=gates.packed_unit)
def hide_layers(wrapped: Wrapped, instance: FSDPParamGroup, args: Args, kwargs: Kwargs) -> object:
    """Put stand-ins in their places before the memory is freed."""
    units.hide_group(instance)
    return wrapped(*args, **kwargs)


@patch.wrap("FSDPParamGroup.reshard", "self", only=gates.packed_unit)
def hide_layers_after_forward(wrapped: Wrapped, instance: FSDPParamGroup, args: Args, kwargs: Kwargs) -> object:
    """The same where what is left after a forward is a smaller group's shard."""
    units.hide_before_smaller(instance)
    return wrapped(*args, **kwargs)
