"""Without the patch every rank has the whole quantized base; with it one has, and the others no more than a layer."""

from __future__ import annotations

from typing import Any

import launched
import pytest
from cells import Bench, Setup
from faults import packed
from launched import KINDS, LOADS, marked, quantized_bytes, quantized_layers, ranks_load

from trainer_fsdp_patch.inspecting.leaves import leaves
from trainer_fsdp_patch.loading import moving

pytestmark = packed


@pytest.mark.parametrize("kind", [marked(kind, LOADS) for kind in KINDS if kind != "4bit-bf16"])
def test_one_rank_has_the_bytes(bench: Bench, kind: str) -> None:
    """Of stock both do. What the other one allocates at once is a layer, and what is not quantized."""
    setup = Setup(f"f2-{kind}", ram_efficient=True, dtype="bfloat16", **KINDS[kind])

    def bytes_of(model: Any, rank: int) -> dict[str, int]:
        small = [
            leaf for layer in quantized_layers(model) for leaf in leaves(layer) if leaf.tensor.nbytes <= moving.KEPT
        ]
        return {"quantized": quantized_bytes(model), "small": sum(leaf.tensor.nbytes for leaf in small)}

    stock = ranks_load(bench.base, setup, False, bytes_of)
    ours = ranks_load(bench.base, setup, True, bytes_of)
    assert stock[0]["quantized"] == stock[1]["quantized"] == ours[0]["quantized"]
    assert ours[1]["quantized"] <= ours[1]["small"]
    assert ours[1]["peak"] < ours[0]["peak"]
    assert ours[1]["live"] <= ours[0]["live"] - (stock[0]["quantized"] - ours[1]["small"])


@pytest.mark.parametrize(
    "environment", [{}, {"ACCELERATE_USE_FSDP": "true"}, {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}], ids=str
)
def test_a_model_that_is_not_loaded_for_fsdp_is_loaded_as_ever(
    bench: Bench, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup("f2", ram_efficient=True, dtype="bfloat16", storage="uint8")
    monkeypatch.setattr(launched, "LAUNCHED", environment)
    first, second = ranks_load(bench.base, setup, True, lambda model, rank: {"bytes": quantized_bytes(model)})
    assert first["bytes"] == second["bytes"]
