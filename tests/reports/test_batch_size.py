"""`auto_find_batch_size` trains on at a smaller batch size, and gives what a run gives that was started with it.

The user lets the Trainer look for a batch size that fits: https://github.com/huggingface/transformers/issues/34113.
After the first error it takes FSDP1's units out, whose parameters are flat, and ends with "weight must be 2-D".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cells import METHODS, Bench, Setup
from checkpoints import Scene, failure, stored_bits, train
from faults import FLAVOURS, runs_out, where

from trainer_fsdp_patch.testing import trial
from trainer_fsdp_patch.training import batch_size

pytestmark = where("transformers>=4.45.dev0")
SETUPS = [Setup(f"f{fsdp}", fsdp=fsdp) for fsdp in FLAVOURS] + [
    Setup("f1-flat", fsdp=1, use_orig_params=False),
    Setup("f1-checkpointing", fsdp=1, checkpointing=True),
]


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_the_next_try_trains(bench: Bench, setup: Setup, place: str) -> None:
    scene = Scene(bench)
    outcomes = scene.run(runs_out(place), setup, patched=True)
    assert failure(outcomes) == "", outcomes[0].extra
    assert outcomes[0].extra["tried"][0] == 2
    assert outcomes[0].extra["tried"][-1] == 1
    small = Setup(setup.name, fsdp=setup.fsdp, batch=trial.BATCH // 2)
    assert scene.right(outcomes, scene.one(runs_out(place), setup), setup) == ""
    assert scene.right(outcomes, started_small(bench, small), setup) == ""


def started_small(bench: Bench, setup: Setup) -> Any:
    """One process, started at the batch size that fits, with the rows that the others have."""
    [one] = Scene(bench).run(train, setup, patched=False, ranks=1)
    assert not one.error, one.extra
    return one


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_after_a_step(bench: Bench, fsdp: int) -> None:
    """What was trained before the error stays trained, as in one process."""
    scene, setup, action = Scene(bench), Setup(f"f{fsdp}", fsdp=fsdp), runs_out("forward", step=1)
    outcomes = scene.run(action, setup, patched=True)
    assert scene.right(outcomes, scene.one(action, setup), setup) == ""


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_a_sharded_head(bench: Bench, fsdp: int) -> None:
    """Trainable parameters that FSDP shards, and the checkpoints of the next try."""
    scene, action, head = Scene(bench), runs_out("backward"), METHODS["lora_head"]
    setup = Setup(f"f{fsdp}", fsdp=fsdp, save_steps=1, placement="shard")
    outcomes = scene.run(action, setup, patched=True, configure=head)
    assert scene.right(outcomes, scene.one(action, setup, head), setup) == ""
    folder = Path(outcomes[0].folder)
    assert stored_bits(folder / f"checkpoint-{trial.STEPS}") == stored_bits(folder)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_one_rank_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch, fsdp: int, rank: int) -> None:
    """The other is in the middle of a step, so both end and say why; nobody waits for ever."""
    monkeypatch.setattr(batch_size, "PATIENCE", 2.0)
    outcomes = Scene(bench).run(runs_out("forward", (rank,)), Setup(f"f{fsdp}", fsdp=fsdp), patched=True)
    assert outcomes[rank].error.startswith(
        f"RankError: auto_find_batch_size: rank {rank} ran out of memory at a batch size of 2 per device, and rank "
        f"{1 - rank} did not. "
    )
    assert outcomes[1 - rank].error
    assert "hung" not in outcomes[1 - rank].error
