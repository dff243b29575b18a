"""CPU ranks of scripts: what `bridge` leaves of them when Python ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import where

from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome

SCRIPT = """
import atexit

import torch.distributed
from transformers import TrainingArguments

from trainer_fsdp_patch.testing import cpu

atexit.register(lambda: print("left" if torch.distributed.is_initialized() else "ended"))
given = TrainingArguments("out", use_cpu=True, ddp_backend="gloo", report_to=[])
for _ in range(2):
    cpu.bridge(given)
assert torch.distributed.is_initialized()
"""


@where("transformers>=5.10.dev0", "torch>=2.6.dev0")
def test_no_process_group_outlives_a_script(python: Callable[..., str]) -> None:
    """A thread of gloo that outlives Python may abort a rank that has done its work."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    assert python(SCRIPT, OMP_NUM_THREADS="1", **alone).splitlines()[-1] == "ended"


def crashing(folder: str, always: bool, rank: int) -> Outcome:
    mark = Path(folder) / "crashed"
    if rank == 1 and (always or not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return Outcome(extra={"rank": rank})


@pytest.mark.parametrize("always", [False, True])
def test_a_rank_that_crashed_is_run_once_more(tmp_path: Path, always: bool, caplog: pytest.LogCaptureFixture) -> None:
    first, second = forks.launch(crashing, str(tmp_path), always, ranks=2)
    assert first.extra["rank"] == 0
    assert second.error == ("ended by SIGSEGV" if always else "")
    assert [record.getMessage()[:34] for record in caplog.records] == ["A rank ended by SIGSEGV. It is run"]
