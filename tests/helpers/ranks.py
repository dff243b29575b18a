"""A function on forked ranks of a process group of its own."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome


def on_ranks(function: Any, ranks: int) -> list[Any]:
    """What a function of the rank gives on each."""

    def child(rank: int) -> Outcome:
        dist.init_process_group("gloo")
        return Outcome(extra={"result": function(rank)})

    outcomes = forks.launch(child, ranks=ranks)
    for outcome in outcomes:
        assert not outcome.error, outcome.extra.get("traceback")
    return [outcome.extra["result"] for outcome in outcomes]
