"""AdaLora notes the ranks it keeps by the names of FSDP's wrapped modules, and its save looks for those."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cells import Bench, Setup, reference_of
from faults import FLAVOURS, canary, equals_one_process, fault_without
from methods import CAUSAL, keeps_a_schedule, scheduled, tuned

NAME = "peft_v0_11_rank_names"


def test_canary() -> None:
    canary(NAME)


@keeps_a_schedule
@pytest.mark.parametrize("setup", [Setup("f1", fsdp=1), Setup("ac", fsdp=max(FLAVOURS), activation_checkpointing=True)])
def test_the_ranks_that_are_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch, setup: Setup) -> None:
    fault_without(NAME, bench, monkeypatch, "adalora_schedule", setup, "KeyError")
    one = bench.reference("adalora_schedule", reference_of(setup))
    ranks, _ = bench.cell("adalora_schedule", setup, patched=True)
    configs = [Path(outcome.folder) / "adapter_config.json" for outcome in (ranks, one)]
    ours, theirs = (json.loads(config.read_text())["rank_pattern"] for config in configs)
    assert ours == theirs
    assert {True, False} <= {kept for row in ours.values() for kept in row}


@keeps_a_schedule
def test_ranks_stay_cut_after_a_save(bench: Bench, tmp_path: Path) -> None:
    """peft shortens the names that it has noted as it saves, and goes on with them."""
    method = tuned(
        "AdaLoraConfig", init_r=4, target_r=2, tinit=0, tfinal=1, total_step=2, even=True, callbacks=scheduled, **CAUSAL
    )
    equals_one_process(bench, method, Setup("saves", fsdp=1, save_steps=1), tmp_path)
