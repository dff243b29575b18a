"""FSDP1 takes room to gather in before its first forward, and a model that is cast later ends with two dtypes in it."""

from __future__ import annotations

from cells import Bench, Setup
from faults import canary, cast_fault


def test_canary() -> None:
    canary("torch_v2_2_cast_units")


def test_cast_after_training(bench: Bench) -> None:
    cast_fault(bench, Setup("f1", fsdp=1))
