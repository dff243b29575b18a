"""accelerate makes units of containers, of parts that adapters read, and of weights that two of them share."""

from __future__ import annotations

import pytest
from cells import Bench, Setup
from faults import canary, fault_without, fsdp2, where

newer = where("transformers>=5.10.dev0", "accelerate>=1.14.dev0", "torch>=2.13.dev0")
"""Before, accelerate asks for no units that share weights."""


def test_canary() -> None:
    canary("torch_v2_6_fully_shard")


@fsdp2
@pytest.mark.parametrize(
    ("method", "setup", "expected"),
    [
        pytest.param("bert lora", Setup("f2"), "Invariant encountered", marks=newer),
        pytest.param("t5 lora", Setup("f2"), "already managed by another FSDP group", marks=newer),
        ("lora", Setup("f2-size", wrap="size"), "does not support containers that do not implement forward"),
    ],
)
def test_what_cannot_be_a_unit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str, setup: Setup, expected: str
) -> None:
    fault_without("torch_v2_6_fully_shard", bench, monkeypatch, method, setup, expected)
