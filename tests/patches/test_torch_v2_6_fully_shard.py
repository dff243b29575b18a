"""accelerate makes units of containers, of parts that adapters read, and of weights that two of them share."""

from __future__ import annotations

import pytest
from cells import Bench, Setup
from faults import canary, fault_without, fsdp2


def test_canary() -> None:
    canary("torch_v2_6_fully_shard")


@fsdp2
@pytest.mark.parametrize(
    ("method", "setup", "expected"),
    [
        ("bert lora", Setup("f2"), "Invariant encountered"),
        ("t5 lora", Setup("f2"), "is shared with a parameter already managed by another FSDP group"),
        ("lora", Setup("f2-size", wrap="size"), "does not support containers that do not implement forward"),
    ],
)
def test_what_cannot_be_a_unit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str, setup: Setup, expected: str
) -> None:
    fault_without("torch_v2_6_fully_shard", bench, monkeypatch, method, setup, expected)
