"""Bases that compressed-tensors has compressed, in the formats that it has for a linear layer."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer_fsdp_patch.testing import trial
from trainer_fsdp_patch.testing.case import Setup

GROUP = 32
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
}


def write(base: str, kind: str, folder: str) -> None:
    """Compress a base.

    Args:
        base: folder of a plain one.
        kind: one of `FORMATS`.
        folder: where the compressed one goes.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.offload import as_single_threaded
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from transformers import AutoModelForCausalLM

    form, given = FORMATS[kind]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    # Int8 and FP8 formats are those of activations that are quantized too, as they come.
    inputs = {} if kind == "int4" else {"input_activations": {**given, "strategy": "token", "dynamic": True}}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**given), **inputs)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=form)
    apply_quantization_config(model, config, show_progress=False)
    for layer in model.modules():
        if hasattr(layer, "quantization_scheme"):
            layer.weight_scale.data = _scales(layer, given)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    with as_single_threaded():
        compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def _scales(layer: nn.Linear, given: dict[str, Any]) -> torch.Tensor:
    width = given.get("group_size", layer.in_features)
    largest = 448 if given["type"] == "float" else 2 ** (given["num_bits"] - 1) - 1
    groups = layer.weight.detach().float().reshape(layer.out_features, -1, width)
    return (groups.abs().amax(-1) / largest).to(layer.weight.dtype)


def load(base: str, setup: Setup, kind: Any) -> Any:
    """Load a base compressed, as "compressed-int4" has it, or dequantized, as "compressed-int4-dequantized"."""
    from transformers import CompressedTensorsConfig

    _, name, *dequantized = setup.quantizer.split("-")
    folder = Path(f"{base}-{name}")
    if not folder.exists() and int(os.environ.get("RANK", "0")) == 0:
        # No rank finds a half of it.
        write(base, name, f"{folder}-written")
        Path(f"{folder}-written").rename(folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    quantization = CompressedTensorsConfig(dequantize=True) if dequantized else None
    with warnings.catch_warnings():
        # transformers says that it takes the configuration of the checkpoint, and these arguments.
        warnings.simplefilter("ignore")
        return trial.load_base(str(folder), setup, kind, quantization)
