"""Checkpoints that are quantized already, as transformers' own quantizers and a program's load them on a CPU."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import quantizers
import torch
from cells import Setup
from torch import nn

from trainer_fsdp_patch.testing import releases

KEPT = ["k_proj", "v_proj", "up_proj", "down_proj", "lm_head"]
"""Layers that are not quantized."""


def _aqlm() -> Any:
    from transformers import AqlmConfig

    return AqlmConfig(in_group_size=4, num_codebooks=2, nbits_per_codebook=4, linear_weights_not_to_quantize=KEPT)


def _fp8() -> Any:
    from transformers import FineGrainedFP8Config

    return FineGrainedFP8Config(weight_block_size=(quantizers.GROUP, quantizers.GROUP), modules_to_not_convert=KEPT)


def _own(method: str) -> Any:
    """A quantizer of a program, which no release of transformers knows; its layers keep their weights in buffers."""
    from transformers.quantizers import HfQuantizer, auto
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Configuration(QuantizationConfigMixin):
        def __init__(self, **kwargs: Any) -> None:
            self.quant_method = method

    class Own(HfQuantizer):
        is_trainable = True

        def is_serializable(self) -> bool:
            return True

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            replace(model, quantizers.PackedLinear)

    class Turning(Own):
        """It turns each weight once all are loaded: what has no bytes cannot be turned."""

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
            for layer in model.modules():
                if isinstance(layer, quantizers.PackedLinear):
                    turned = layer.qweight.flip(0)
                    assert bool((turned.flip(0) == layer.qweight).all())
                    layer.qweight = turned

    if method not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(method)(Configuration)
        auto.register_quantizer(method)(Turning if method == "turning" else Own)
    return Configuration()


CONFIGURED = {"aqlm": _aqlm, "fp8": _fp8, "own": lambda: _own("own"), "turning": lambda: _own("turning")}
LAID_OUT = {"aqlm": "aqlm", "fp8": "fp8", "own": "gptq", "turning": "gptq"}
"""The layers of each, by their name in `quantizers`."""


def replace(model: nn.Module, make: Any) -> None:
    """Put quantized layers into a model, as each quantizer does."""
    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            if key in quantizers.LAYERS:
                setattr(module, key, make(child))


def write(base: str, method: str, folder: Path) -> None:
    """Write a base with quantized layers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, **{releases.dtype_argument(): torch.bfloat16})
    replace(model, quantizers.REPLACED[LAID_OUT[method]])
    save(model, CONFIGURED[method](), folder)


def save(model: Any, quantization: Any, folder: Path) -> None:
    """Write a model whose layers are a quantizer's, with the quantizer's configuration."""
    from safetensors.torch import save_file

    folder.mkdir()
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "quantization_config": quantization.to_dict()}
    (folder / "config.json").write_text(json.dumps(config, default=str))


def _on_cpu(layer: Any, x: torch.Tensor) -> torch.Tensor:
    size = quantizers.GROUP
    scales = layer.weight_scale_inv.repeat_interleave(size, 0).repeat_interleave(size, 1)
    return nn.functional.linear(x, (layer.weight.float() * scales).to(x.dtype))


def by_the_first(folder: Path, make: Callable[[Path], None]) -> None:
    """Have the first rank write a folder where there is none, and the others wait for it."""
    if not folder.exists() and int(os.environ.get("RANK", "0")) == 0:
        # No rank finds a half of it.
        make(Path(f"{folder}-written"))
        Path(f"{folder}-written").rename(folder)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def load(base: str, setup: Setup) -> Any:
    """Load a base that is quantized as the set-up has it; the first rank writes it where there is none."""
    from transformers import AutoModelForCausalLM

    method = setup.quantizer.partition("-")[2]
    folder = Path(f"{base}-{method}")
    by_the_first(folder, lambda place: write(base, method, place))
    CONFIGURED[method]()
    with _fp8_on_cpu() if method == "fp8" else contextlib.nullcontext():
        # `quantization_config=None`, as other bases are loaded with, is more to transformers than what the file says.
        kind = {releases.dtype_argument(): torch.bfloat16}
        model = AutoModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager", **kind)
    model.config.use_cache = False
    return model


def _fp8_on_cpu() -> Any:
    """Without a GPU transformers dequantizes FP8. Its kernel needs one, and this forward does without."""
    from transformers.integrations import finegrained_fp8
    from transformers.quantizers import quantizer_finegrained_fp8 as fp8

    finegrained_fp8.FP8Linear.forward = _on_cpu  # type: ignore[method-assign]
    return mock.patch.object(fp8.FineGrainedFP8HfQuantizer, "validate_environment")
