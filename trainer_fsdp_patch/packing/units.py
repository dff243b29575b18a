"""FSDP's units show their packed layers when they are gathered, and hide them when they are sharded again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from trainer_fsdp_patch.names import PACKED
from trainer_fsdp_patch.packing.packed import Packed, packed_of

if TYPE_CHECKING:
    import torch
    from torch.distributed.fsdp._flat_param import FlatParamHandle
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup


class _Part(NamedTuple):
    """A packed layer of a flat parameter, and the elements of it that are the layer's."""

    layer: Packed
    first: int
    last: int


_PARTS: weakref.WeakKeyDictionary[FlatParamHandle, list[_Part]] = weakref.WeakKeyDictionary()


def has_packed(unit: object) -> bool:
    """Whether an object is a unit, of either version of FSDP, that holds a packed layer."""
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    if isinstance(unit, FlatParamHandle):
        return hasattr(unit, "flat_param") and bool(_parts(unit))
    params = getattr(unit, "fsdp_params", None)
    return isinstance(params, list) and any(_layer_of(item) is not None for item in params)


def _parts(handle: FlatParamHandle) -> list[_Part]:
    """The packed layers of a flat parameter; FSDP never changes what it has flattened."""
    if handle not in _PARTS:
        flat = handle.flat_param
        first, parts, infos = 0, [], iter(flat._param_infos)
        for count, padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
            info = None if padding else next(infos)
            layer = packed_of(info.module) if info is not None and info.param_name == PACKED else None
            if layer is not None:
                parts.append(_Part(layer, first, first + count))
            first += count
        _PARTS[handle] = parts
    return _PARTS[handle]


def show_flat(handle: FlatParamHandle) -> None:
    """Show the layers of a unit of FSDP1 whose flat parameter is full.

    Args:
        handle: after its `unshard`.
    """
    import torch

    # The flat parameter itself requires no gradient, or is one of plain numbers next to which nothing is packed.
    flat = handle.flat_param.data
    for part in _parts(handle):
        part.layer.show(flat[part.first : part.last].view(torch.uint8))


def hide_flat(handle: FlatParamHandle) -> None:
    """Hide the layers of a unit of FSDP1.

    Args:
        handle: before its `reshard`, which may free its memory.
    """
    for part in _parts(handle):
        part.layer.hide()


def show_group(group: FSDPParamGroup) -> None:
    """Show the layers of a group of FSDP2 that is gathered.

    Args:
        group: after the wait for its all-gather.
    """
    for layer, stored in _of_group(group):
        layer.show(stored)


def hide_group(group: FSDPParamGroup) -> None:
    """Hide the layers of a group of FSDP2.

    Args:
        group: before it is sharded, which frees its memory.
    """
    for item in group.fsdp_params:
        layer = _layer_of(item)
        if layer is not None:
            layer.hide()


def hide_before_smaller(group: FSDPParamGroup) -> None:
    """Hide the layers of a group of FSDP2 that keeps a smaller group's shard after a forward.

    Args:
        group: before it is resharded.
    """
    if group._use_post_forward_mesh:
        hide_group(group)


def _layer_of(item: FSDPParam) -> Packed | None:
    info = item._module_info
    return packed_of(info.module) if info.param_name == PACKED else None


def _of_group(group: FSDPParamGroup) -> Iterator[tuple[Packed, torch.Tensor]]:
    import torch

    for item in group.fsdp_params:
        layer = _layer_of(item)
        if layer is not None:
            yield layer, item._unsharded_param.detach().view(torch.uint8)


def is_followed(fsdp_version: int) -> bool:
    """Whether the installed units of FSDP show packed layers: the patch for that version is applied.

    Args:
        fsdp_version: 1 or 2.
    """
    if fsdp_version == 1:
        from torch.distributed.fsdp._flat_param import FlatParamHandle

        return _is_ours(vars(FlatParamHandle).get("unshard"))
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    except ImportError:
        return False
    return _is_ours(vars(FSDPParamGroup).get("_to_unsharded"))


def _is_ours(function: object) -> bool:
    """Whether a function, or one inside of it, is a wrapper of this package."""
    while function is not None:
        if hasattr(function, "_self_place"):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
