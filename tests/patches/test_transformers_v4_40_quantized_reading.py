"""Without the patch 8-bit weights stay on every rank under their second name, and quanto and torchao do not load."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import launched
import pytest
from cells import Bench, Setup
from faults import packed, where
from launched import KINDS, LOADS, marked, quantized_bytes, quantized_layers, ranks_load

from trainer_fsdp_patch.inspecting.leaves import leaves
from trainer_fsdp_patch.loading import moving, streaming

pytestmark = packed


def setup_of(kind: str) -> Setup:
    return Setup(f"f2-{kind}", ram_efficient=True, dtype="bfloat16", **KINDS[kind])


def bytes_of(model: Any, rank: int) -> dict[str, int]:
    found = [leaf for layer in quantized_layers(model) for leaf in leaves(layer)]
    small = sum(leaf.tensor.nbytes for leaf in found if leaf.tensor.nbytes <= moving.KEPT)
    return {"quantized": quantized_bytes(model), "small": small}


@pytest.mark.parametrize("kind", [marked(kind, LOADS) for kind in KINDS if kind != "4bit-bf16"])
def test_one_rank_has_the_bytes(bench: Bench, kind: str) -> None:
    first, second = ranks_load(bench.base, setup_of(kind), True, bytes_of)
    assert second["quantized"] <= second["small"]
    assert second["peak"] < first["peak"]
    assert second["live"] < first["live"]


@pytest.mark.parametrize("kind", [marked("8bit", LOADS)])
def test_without_it_8_bit_weights_stay_under_their_second_name(bench: Bench, kind: str) -> None:
    first, second = ranks_load(bench.base, setup_of(kind), False, bytes_of)
    assert second["quantized"] == first["quantized"]


@pytest.mark.parametrize("kind", [marked(kind, LOADS) for kind in ("torchao", "quanto")])
def test_without_it_tensors_of_other_classes_are_not_loaded(bench: Bench, kind: str) -> None:
    with pytest.raises(AssertionError, match="TypeError"):
        ranks_load(bench.base, setup_of(kind), False, bytes_of)


@where("transformers>=4.50")
def test_what_torchao_chooses_once_all_is_loaded_is_left_alone() -> None:
    """Its other types are done by then. The class is the same."""
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    quantizer: Any = TorchAoHfQuantizer.__new__(TorchAoHfQuantizer)
    for kind, taken in (("int8_weight_only", True), ("autoquant", False)):
        quantizer.quantization_config = SimpleNamespace(quant_type=kind)
        assert streaming.sets_layers(quantizer) is taken


def test_nothing_is_left_on_the_quantizer_and_upstream_s_answer_is_its_own(bench: Bench) -> None:
    def left(model: Any, rank: int) -> dict[str, Any]:
        from transformers import modeling_utils

        os.environ.update(launched.LAUNCHED)
        own = [name for name, value in vars(model.hf_quantizer).items() if callable(value)]
        return {"own": own, "launched": bool(modeling_utils.is_fsdp_enabled())}

    for result in ranks_load(bench.base, setup_of("4bit"), True, left):
        assert result["own"] == []
        assert result["launched"] is True
