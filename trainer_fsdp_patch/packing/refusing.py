"""Casts of packed bytes are refused: they would be other bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from trainer_fsdp_patch.errors import AdapterError
from trainer_fsdp_patch.names import PACKED
from trainer_fsdp_patch.packing.packed import packed_layers

if TYPE_CHECKING:
    import torch
    from torch import nn


def refuse_cast(model: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Refuse a cast of packed bytes, which would be others in another dtype, before anything is changed.

    Args:
        model: a planned one.
        function: that `Module._apply` is about to call with each tensor.

    Raises:
        AdapterError: it gives another dtype.
    """
    import torch

    named = ((item.layer._parameters.get(PACKED), item.name) for item in packed_layers(model))
    dtypes = {parameter.dtype: name for parameter, name in named if parameter is not None}
    for dtype, name in dtypes.items():
        cast = function(torch.empty(0, dtype=dtype)).dtype
        if cast != dtype:
            raise AdapterError(
                name,
                f"it is quantized, and its bytes, which FSDP has sharded as {dtype}, would be cast to {cast}",
                "Other bytes are other weights; nothing has been cast",
                "Leave out the cast, such as bf16_full_eval or fp16_full_eval: a quantized layer casts by itself",
                tensor=name,
            )
