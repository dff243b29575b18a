"""Quantized weights were full on each rank under FSDP2, which shards a tensor and not what hangs on it.

https://github.com/huggingface/accelerate/issues/3983
"""

from __future__ import annotations

import pytest
from cells import Bench, Setup
from faults import STORAGES, canary, fsdp2, halves, packed


def test_canary() -> None:
    canary("torch_v2_6_packed_groups")


@fsdp2
@packed
@pytest.mark.parametrize("storage", STORAGES)
def test_a_rank_holds_its_share(bench: Bench, monkeypatch: pytest.MonkeyPatch, storage: str) -> None:
    halves(bench, monkeypatch, Setup(f"f2-{storage}", dtype="bfloat16", storage=storage))
