"""bitsandbytes' layers on the meta device, with all that a quantized layer keeps and no weight."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch.errors import PlanError
from trainer_fsdp_patch.inspecting import leaves
from trainer_fsdp_patch.inspecting.inventory import nbytes_of

if TYPE_CHECKING:
    import torch
    from torch import nn

_BLOCK = 64
"""Weights that share one absmax; bitsandbytes' default."""


def quantized(model: nn.Module, kind: str) -> nn.Module:
    """The same model with quantized layers, as `from_pretrained` would load it with a BitsAndBytesConfig.

    Args:
        model: on meta; its linear layers are replaced.
        kind: "4bit" or "8bit".

    Raises:
        PlanError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        text = ("bitsandbytes is not installed", "No plan was made", "Install what your project pins")
        raise PlanError("--quantize", *text, setting="--quantize")
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    given: dict[str, Any] = {f"load_in_{kind}": True}
    if kind == "4bit":
        given |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(**given)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    with torch.device("meta"):
        try:
            quantizer.preprocess_model(model, device_map={"": "cpu"})
        except NameError:
            # until transformers 4.46
            # Its module of bitsandbytes imports nothing without an accelerator.
            found = "the installed transformers builds quantized layers next to an accelerator alone"
            raise PlanError(
                "--quantize", found, "No plan was made", "Plan where one is", setting="--quantize"
            ) from None
        for module in model.modules():
            if type(module).__name__ == "Linear4bit":
                _fill_4bit(module)
            elif type(module).__name__ == "Linear8bitLt":
                _fill_8bit(module)
    quantizer.postprocess_model(model)
    return model


def unpacked(model: nn.Module) -> int:
    """Bytes of the largest quantized layer while it computes, as 16 bits; 0 where there is none.

    Args:
        model: with an adapter, quantized or not.
    """
    kinds = ("Linear4bit", "Linear8bitLt")
    layers = [module for module in model.modules() if type(module).__name__ in kinds and hasattr(module, "in_features")]
    return max((2 * int(layer.in_features * layer.out_features) for layer in layers), default=0)  # type: ignore[operator]


def scales(layer: nn.Module) -> int:
    """Bytes that a quantized layer keeps in other tensors than parameters.

    Args:
        layer: on meta.
    """
    own = set(map(id, layer.parameters(recurse=False)))
    others = {id(leaf.tensor): leaf.tensor for leaf in leaves.leaves(layer) if id(leaf.tensor) not in own}
    return sum(nbytes_of(tensor) for tensor in others.values())


def _fill_4bit(layer: Any) -> None:
    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    shape: torch.Size = layer.weight.shape
    count = shape.numel()
    state = QuantState(
        torch.empty(-(-count // _BLOCK)),
        shape=shape,
        code=torch.empty(16),
        blocksize=_BLOCK,
        quant_type="nf4",
        dtype=layer.compute_dtype or torch.bfloat16,
    )
    stored = torch.empty((-(-count // 2), 1), dtype=torch.uint8)
    layer.weight = Params4bit(
        stored, requires_grad=False, quant_state=state, quant_type="nf4", module=layer, bnb_quantized=True
    )
    layer.weight.quant_state = state


def _fill_8bit(layer: Any) -> None:
    import torch
    from bitsandbytes.nn import Int8Params

    shape: torch.Size = layer.weight.shape
    scales = torch.empty(shape[0])
    layer.weight = Int8Params(torch.empty(shape, dtype=torch.int8), requires_grad=False, SCB=scales)
    layer.weight.SCB = scales
