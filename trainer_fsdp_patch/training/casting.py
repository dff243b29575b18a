"""Casts of a model that FSDP has run already: `bf16_full_eval`, `model.to(dtype)`, `half()`.

FSDP reads the dtype of what it shards before its first forward. It takes room of that dtype to gather it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.measuring import footprint
from trainer_fsdp_patch.packing import refusing
from trainer_fsdp_patch.planning.prepared import Prepared, prepared_for
from trainer_fsdp_patch.saving import gathering

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.fsdp._flat_param import FlatParamHandle
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

Result = TypeVar("Result")


def applied(
    upstream: Callable[..., Result],
    model: nn.Module,
    function: Callable[[torch.Tensor], torch.Tensor],
    *args: object,
    **kwargs: object,
) -> Result:
    """Move or cast a planned model, and have FSDP read the dtypes again.

    Args:
        upstream: the `_apply` of FSDP's class, which goes through all tensors.
        model: wrapped by FSDP, planned.
        function: that each tensor is given to.
        *args: for upstream.
        **kwargs: for upstream.

    Raises:
        AdapterError: packed bytes of a quantized layer would be cast.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    prepared = prepared_for(model)
    assert prepared is not None
    refusing.refuse_cast(model, function)
    before = gathering.dtype(model, prepared)
    result = upstream(function, *args, **kwargs)
    after = gathering.dtype(model, prepared)
    if after != before:
        prepared.cast_to(after)
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            _read_flat(module._handle)
        for group in footprint.groups(module):
            _read_group(group)
    _look_up(prepared)
    return result


def _read_flat(handle: FlatParamHandle | None) -> None:
    """Have a unit of FSDP1 take room for shards of another dtype; before the first forward it has taken none."""
    if handle is None:
        return
    shard = getattr(handle.flat_param, "_local_shard", None)
    if shard is not None and shard.dtype != handle.flat_param.dtype:
        handle.init_flat_param_attributes()


def _read_group(group: FSDPParamGroup) -> None:
    """Have a group of FSDP2 read its dtypes again, and gather into new tensors."""
    cast = [
        item for item in group.fsdp_params if getattr(item, "orig_dtype", None) not in (None, item.sharded_param.dtype)
    ]
    # FSDP2 makes both anew in its next all-gather, of the dtype that it reads now.
    for item in cast:
        item.all_gather_outputs = []
        vars(item).pop("_unsharded_param", None)
    if cast:
        group._init_mp_dtypes()


def _look_up(prepared: Prepared) -> None:
    """Find the tensors that are FSDP's no part again: buffers are other objects after a move.

    Not while FSDP2 takes the model: they are hidden then.
    """
    here = {slot.name for slot in inventory.named_tensors(prepared.model())}
    if here.issuperset(prepared.roles):
        prepared.refresh()
