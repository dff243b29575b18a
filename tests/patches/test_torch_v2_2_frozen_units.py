"""FSDP1 frees a frozen unit after it has gathered the next one, and a decoder's units after all of them."""

from __future__ import annotations

import pytest
from cells import Bench, Setup
from faults import canary, skip_without_reference

from trainer_fsdp_patch.patching import registry

NAME = "torch_v2_2_frozen_units"


def test_canary() -> None:
    canary(NAME)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["vera", "lora", "t5 vera", "t5 lora"])
def test_one_unit_at_a_time(bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str, checkpointing: bool) -> None:
    """Without it two layers are gathered at once; with it the root and one."""
    setup = Setup("f1", fsdp=1, checkpointing=checkpointing)
    skip_without_reference(bench, method, setup)
    with monkeypatch.context() as context:
        context.setenv(registry.DISABLE, NAME)
        without, _ = bench.cell(method, setup, patched=True)
    outcome, verdict = bench.cell(method, setup, patched=True)
    assert verdict.right, verdict.error
    assert without.footprint is not None
    assert outcome.footprint is not None
    assert outcome.planned is not None
    assert outcome.footprint.gathered == outcome.planned.gathered
    assert without.footprint.gathered > outcome.footprint.gathered
