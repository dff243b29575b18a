"""FSDP2 takes room to gather in before its first forward, and a model that is cast later ends with two dtypes in it."""

from __future__ import annotations

from cells import Bench, Setup
from faults import canary, cast_fault, fsdp2


def test_canary() -> None:
    canary("torch_v2_6_cast_groups")


@fsdp2
def test_cast_after_training(bench: Bench) -> None:
    cast_fault(bench, Setup("f2", fsdp=2))
