"""Quantized weights were full on each rank under FSDP1, which flattens floating-point tensors only.

https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1709
"""

from __future__ import annotations

import pytest
from cells import Bench, Setup
from faults import STORAGES, canary, halves, packed


def test_canary() -> None:
    canary("torch_v2_2_packed_units")


@packed
@pytest.mark.parametrize("storage", STORAGES)
def test_a_rank_holds_its_share(bench: Bench, monkeypatch: pytest.MonkeyPatch, storage: str) -> None:
    halves(bench, monkeypatch, Setup(f"f1-{storage}", fsdp=1, dtype="bfloat16", storage=storage))


@packed
def test_stock_cannot_flatten_integers(bench: Bench) -> None:
    _, verdict = bench.cell("lora", Setup("f1-uint8", fsdp=1, dtype="bfloat16", storage="uint8"), patched=False)
    assert "Cannot flatten integer dtype tensors" in verdict.error
