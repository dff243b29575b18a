"""What would make other weights of quantized bytes is refused: casts, and layers that are rebuilt in a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from trainer_fsdp_patch.bits import SIZES
from trainer_fsdp_patch.errors import AdapterError, PlanError
from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.names import PACKED
from trainer_fsdp_patch.packing.choosing import quantized_layers
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


def refuse_rebuilt(taken: inventory.Inventory) -> None:
    """Refuse a base whose layers are still to be rebuilt in the first forward, when FSDP has their tensors.

    compressed-tensors does so. No quantizer is asked for by name: such a layer is of torch's own class, which computes
    with none of what the layer keeps, and a module around it has a hook before its forward.

    Args:
        taken: inventory of the model.

    Raises:
        PlanError: a layer is one of these.
    """
    for name, layer in quantized_layers(taken).items():
        if _is_unable(layer) and any(module._forward_pre_hooks for module in taken.walked.above(layer)):
            raise PlanError(
                name,
                f"a torch {type(layer).__name__} that keeps {_kept(layer)}, for a hook to rebuild it before a forward",
                "FSDP would have sharded its tensors by then, and each rank would hold all of what is rebuilt",
                "Load the base with dequantize=True in its quantization config: FSDP shards it like any other",
                setting="quantization_config",
            )


def _is_unable(layer: nn.Module) -> bool:
    """Whether a layer is of a class of torch's that cannot compute with the layer's weight."""
    weight = layer._parameters.get("weight")
    if type(layer).__module__.partition(".")[0] != "torch":
        return False
    return weight is None or (not inventory.inner_names(weight) and _dtype(weight) not in SIZES)


def _kept(layer: nn.Module) -> str:
    return " and ".join(sorted({_dtype(item) for item in layer._parameters.values() if item is not None}))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
