"""Quantized bases beside bitsandbytes' own: how each is loaded, on layers of the same layout where it needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import compressed
import torch
from torch import nn

from trainer_fsdp_patch.testing import trial
from trainer_fsdp_patch.testing.case import Setup

GROUP = 32
LAYERS = ("q_proj", "o_proj", "gate_proj")


def _torchao(setup: Setup) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from transformers import TorchAoConfig

    four = IntxWeightOnlyConfig(weight_dtype=torch.int4)
    return TorchAoConfig(four if setup.quantizer.endswith("int4") else Int8WeightOnlyConfig())


def _quanto(setup: Setup) -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights=setup.quantizer.rpartition("-")[2])


class PackedLinear(nn.Linear):
    """A linear layer in the layout of GPTQ and AWQ: buffers with eight 4-bit weights a word, scales and zeros."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        del self.weight
        groups = layer.weight.detach().float().reshape(layer.out_features, -1, GROUP)
        zeros = groups.amin(-1, keepdim=True)
        scales = ((groups.amax(-1, keepdim=True) - zeros) / 15).clamp(min=1e-8)
        codes = ((groups - zeros) / scales).round().to(torch.int32).reshape(layer.out_features, -1, 8)
        self.register_buffer("qweight", (codes << (4 * torch.arange(8, dtype=torch.int32))).sum(-1, dtype=torch.int32))
        self.register_buffer("scales", scales.half())
        self.register_buffer("zeros", zeros.half())

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        codes = (self.qweight.unsqueeze(-1) >> (4 * torch.arange(8, dtype=torch.int32))) & 15
        groups = codes.reshape(self.out_features, -1, GROUP)
        return (groups * self.scales.float() + self.zeros.float()).reshape(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


def _fp8(layer: nn.Linear) -> nn.Module:
    """transformers' own layer for FP8 checkpoints; its kernel needs a GPU, and the forward does without."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    class OnCpu(FP8Linear):  # type: ignore[misc, unused-ignore]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scales = self.weight_scale_inv.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
            return nn.functional.linear(x, (self.weight.float() * scales).to(x.dtype))

    made = OnCpu(layer.in_features, layer.out_features, (GROUP, GROUP))
    rows, columns = layer.out_features // GROUP, layer.in_features // GROUP
    blocks = layer.weight.detach().float().reshape(rows, GROUP, columns, GROUP)
    scales = blocks.abs().amax((1, 3), keepdim=True) / 448
    made.weight.data = (blocks / scales).to(torch.float8_e4m3fn).reshape(layer.weight.shape)
    made.weight_scale_inv.data = scales.reshape(rows, columns)
    return made


def _hqq(layer: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=GROUP)
    return HQQLinear(layer, config, compute_dtype=layer.weight.dtype, device="cpu")  # type: ignore[no-untyped-call]


def _aqlm(layer: nn.Linear) -> nn.Module:
    """AQLM's own layer; on a CPU torch computes it where codebooks have another size than 256."""
    from aqlm import QuantizedLinear

    books, size, width = 2, 16, 4
    made: nn.Module = QuantizedLinear(
        layer.in_features, layer.out_features, width, 1, books, 4, bias=False, dtype=layer.weight.dtype
    )
    weight = layer.weight.detach().float()
    scales = weight.abs().amax(1, keepdim=True)
    left = (weight / scales).reshape(-1, width)
    for index in range(books):
        book = left[torch.randperm(len(left), generator=torch.Generator().manual_seed(index))[:size]]
        codes = torch.cdist(left, book).argmin(1)
        made.codebooks.data[index, :, 0] = book.to(layer.weight.dtype)  # type: ignore[union-attr, operator, index]
        made.codes.data[..., index] = codes.reshape(made.codes.shape[:2])  # type: ignore[union-attr, operator, index]
        # The next codebook codes what this one has left over.
        left = left - book[codes]
    made.scales.data = scales.to(layer.weight.dtype)[..., None, None]
    return made


CONFIGURED: dict[str, Callable[[Setup], Any]] = {"torchao": _torchao, "quanto": _quanto}
REPLACED: dict[str, Callable[[nn.Linear], nn.Module]] = {"gptq": PackedLinear, "fp8": _fp8, "hqq": _hqq, "aqlm": _aqlm}
"""Those that transformers loads, and those whose layers are put in place here: it has none for HQQ (5.24)."""


def load(folder: str, setup: Setup, kind: Any) -> Any:
    """Load a base as its set-up has it quantized."""
    name = setup.quantizer.partition("-")[0]
    if name == "compressed":
        return compressed.load(folder, setup, kind)
    quantization = CONFIGURED[name](setup) if name in CONFIGURED else None
    model = trial.load_base(folder, setup, kind, quantization)
    if name in REPLACED:
        for module in list(model.modules()):
            for key, child in list(module.named_children()):
                if key in LAYERS:
                    setattr(module, key, REPLACED[name](child))
    return model
