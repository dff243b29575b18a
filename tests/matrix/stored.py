"""Layers as transformers' quantizers make them, full of random bytes: what they keep is real, whatever computes it."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

WIDTH = 64
"""Features of a layer that runs here, in and out."""

_SIZES = types.SimpleNamespace(
    hidden_size=64, intermediate_size=64, num_local_experts=2, hidden_act="silu", hidden_activation="silu"
)


def _fp8(kind: str) -> nn.Module:
    from transformers.integrations import finegrained_fp8

    if kind == "experts":
        return finegrained_fp8.FP8Experts(_SIZES, block_size=(32, 32))
    if kind == "experts of 4 bits":
        return finegrained_fp8.FP8Experts(_SIZES, scale_fmt="ue8m0", expert_dtype="fp4")
    if kind == "embedding":
        return finegrained_fp8.FP8Embedding(96, WIDTH)
    if kind == "grouped":
        return finegrained_fp8.FP8GroupedLinear(WIDTH, 96, 2, block_size=(16, 16), has_bias=True)
    if kind == "per tensor":
        return finegrained_fp8.FP8Linear(WIDTH, 96, activation_scheme="static")
    if kind == "powers of two":
        return finegrained_fp8.FP8Linear(WIDTH, 96, block_size=(1, 32), scale_fmt="ue8m0")
    return finegrained_fp8.FP8Linear(WIDTH, 96, block_size=(8, 8), has_bias=True)


def _fbgemm(kind: str) -> nn.Module:
    from transformers.integrations import fbgemm_fp8

    if kind == "experts":
        return fbgemm_fp8.FbgemmFp8Llama4TextExperts(_SIZES)
    return fbgemm_fp8.FbgemmFp8Linear(WIDTH, 96, bias=True)


def _nvfp4() -> nn.Module:
    """Its class asks a kernel of the hub for the shape of its scales."""
    from transformers.integrations import nvfp4

    kernel = types.SimpleNamespace(swizzled_sf_shape=lambda rows, columns: (rows, columns // 64))
    with mock.patch.object(nvfp4, "load_nvfp4_kernel", return_value=kernel):
        layer = nvfp4.NVFP4Linear(WIDTH, WIDTH)
    # Its conversion puts two values a byte in the place of the numbers that a checkpoint has.
    layer.weight = nn.Buffer(torch.zeros(WIDTH, WIDTH // 2, dtype=torch.uint8))
    return layer


def _gguf(kind: str) -> nn.Module:
    from transformers.integrations.gguf import dequant, utils

    if kind == "experts":
        return utils.GgufExperts(2, 256, 256, dequant.GGML_Q4_K, dequant.GGML_Q6_K, nn.SiLU())
    if kind == "embedding":
        return utils.GgufEmbedding(96, 256, dequant.GGML_Q6_K)
    return utils.GgufLinear(256, 64, dequant.GGML_IQ4_XS, bias=True)


def _gemma(bits: int) -> nn.Module:
    from transformers.integrations.gemma_quant import QuantizedEmbedding, QuantizedLinear

    if not bits:
        return QuantizedEmbedding(96, WIDTH, torch.bfloat16, num_bits=4)
    return QuantizedLinear(WIDTH, WIDTH, bias=bits == 4, num_bits=bits)


def _made(module: str, name: str, *args: Any, **kwargs: Any) -> nn.Module:
    made: nn.Module = getattr(__import__(module, fromlist=[name]), name)(*args, **kwargs)
    return made


def _vptq() -> nn.Module:
    sizes = {"vector_lens": [-1, 8], "num_centroids": [-1, 256], "num_res_centroids": [-1, -1]}
    layout = {"group_num": 1, "group_size": WIDTH, "outlier_size": 0, "indices_as_float": False, "bias": False}
    flags = {"enable_norm": True, "enable_perm": True, "is_indice_packed": True, "vector_quant_dim": "out"}
    return _made("vptq", "VQuantLinear", WIDTH, 96, dtype=torch.bfloat16, **sizes, **layout, **flags)


class Hollow(nn.Module):
    """The layout of FP-Quant, whose package needs triton: next to codes and scales, parameters without an element."""

    def __init__(self) -> None:
        super().__init__()
        self.qweight = nn.Parameter(torch.zeros(WIDTH, WIDTH // 2, dtype=torch.uint8), requires_grad=False)
        self.scales = nn.Parameter(torch.zeros(WIDTH, WIDTH // 32, dtype=torch.uint8), requires_grad=False)
        self.weight = nn.Parameter(torch.zeros(0))
        self.dqweight = nn.Parameter(torch.zeros(0))
        self.register_buffer("hadamard", torch.zeros(32, 32, dtype=torch.bfloat16))


class Attributes(nn.Module):
    """The layout of SINQ, whose package needs many others: no parameter and no buffer, all in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.W_q = torch.zeros(WIDTH, WIDTH // 2, dtype=torch.uint8)
        self.meta = {"scale": torch.ones(WIDTH, 1), "zero": torch.zeros(WIDTH, 1)}


_IN = "transformers.integrations."

LAYERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "aqlm": ("aqlm", functools.partial(_made, "aqlm", "QuantizedLinear", WIDTH, 96, 8, 1, 2, 8, bias=True)),
    "auto-round": (
        "auto-round",
        functools.partial(_made, "auto_round_extension.torch.qlinear_torch_zp", "QuantLinear", 4, 32, WIDTH, 96, True),
    ),
    "bitnet": (
        "bitnet",
        functools.partial(_made, _IN + "bitnet", "BitLinear", WIDTH, WIDTH, True, dtype=torch.float32),
    ),
    "compressed-tensors": (
        "compressed-tensors",
        functools.partial(_made, _IN + "compressed_tensors", "CompressedTensorsFP8Linear", WIDTH, 96, True),
    ),
    "eetq": ("eetq", functools.partial(_made, _IN + "eetq", "EetqLinear", WIDTH, 96, bias=True)),
    "fbgemm linear": ("fbgemm_fp8", functools.partial(_fbgemm, "")),
    "fbgemm experts": ("fbgemm_fp8", functools.partial(_fbgemm, "experts")),
    "fp8 linear": ("fp8", functools.partial(_fp8, "")),
    "fp8 per tensor": ("fp8", functools.partial(_fp8, "per tensor")),
    "fp8 grouped": ("fp8", functools.partial(_fp8, "grouped")),
    "fp8 embedding": ("fp8", functools.partial(_fp8, "embedding")),
    "fp8 experts": ("fp8", functools.partial(_fp8, "experts")),
    "fp8 experts of 4 bits": ("fp8", functools.partial(_fp8, "experts of 4 bits")),
    "fp_quant": ("fp_quant", Hollow),
    "gemma 2 bits": ("gemma", functools.partial(_gemma, 2)),
    "gemma 4 bits": ("gemma", functools.partial(_gemma, 4)),
    "gemma 8 bits": ("gemma", functools.partial(_gemma, 8)),
    "gemma embedding": ("gemma", functools.partial(_gemma, 0)),
    "gguf linear": ("gguf", functools.partial(_gguf, "")),
    "gguf embedding": ("gguf", functools.partial(_gguf, "embedding")),
    "gguf experts": ("gguf", functools.partial(_gguf, "experts")),
    "higgs": ("higgs", functools.partial(_made, _IN + "higgs", "HiggsLinear", 256, 64, 4, dtype=torch.bfloat16)),
    "metal": ("metal", functools.partial(_made, _IN + "metal_quantization", "MetalLinear", 128, 64, True)),
    "mxfp4": ("mxfp4", functools.partial(_made, _IN + "mxfp4", "Mxfp4GptOssExperts", _SIZES)),
    "mxfp8": ("mxfp8", functools.partial(_fp8, "powers of two")),
    "nvfp4": ("nvfp4", _nvfp4),
    "vptq": ("vptq", _vptq),
}
"""The quantizer that makes a layer, by transformers' name of it, and how the layer is made."""

RUN_HERE = ("bitnet", "gemma 2 bits", "gemma 4 bits", "gemma 8 bits")
"""Layers of WIDTH features in and out whose own forward runs on a CPU, without a package."""


def layer(name: str) -> nn.Module:
    """A layer with random bytes in its integers and its FP8 numbers, and random numbers in everything else.

    Raises:
        ImportError: the package of its quantizer is not installed.
    """
    torch.manual_seed(0)
    made = LAYERS[name][1]().requires_grad_(False)
    for tensor in (*made.parameters(), *made.buffers()):
        if tensor.element_size() > 1 and tensor.is_floating_point():
            tensor.data.normal_(std=0.1)
        elif tensor.numel():
            stored = torch.randint(0, 256, (tensor.nbytes,)).to(torch.uint8)
            tensor.data = stored.view(tensor.dtype).reshape(tensor.shape)
    return made
