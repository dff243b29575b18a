"""CPU ranks of scripts: what `bridge` leaves of them when Python ends."""

from __future__ import annotations

from collections.abc import Callable

from faults import where

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
