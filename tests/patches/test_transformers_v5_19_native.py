"""Beside a base that transformers shards itself, it averages the adapter tensor by tensor."""

from pathlib import Path
from typing import Any

import checkpoints
from cells import Bench, Setup
from faults import canary


def test_canary() -> None:
    canary("transformers_v5_19_native")


def counted(trainer: Any, folder: Path) -> dict[str, Any]:
    """All-reduces of the last step."""
    import torch.distributed as dist

    upstream, calls = dist.all_reduce, []

    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        calls.append(trainer.state.global_step)
        return upstream(*args, **kwargs)

    dist.all_reduce = all_reduce
    trainer.train()
    tensors = sum(parameter.requires_grad for parameter in trainer.model.parameters())
    return {"calls": calls.count(trainer.state.global_step - 1), "tensors": tensors, "saved": True}


def test_one_all_reduce_for_the_adapter(bench: Bench) -> None:
    scene = checkpoints.Scene(bench)
    for patched in (False, True):
        [outcome, _] = scene.run(counted, Setup("native", fsdp=0), patched=patched, native=True)
        assert not outcome.error, outcome.extra
        assert outcome.extra["tensors"] == 8
        assert outcome.extra["calls"] == (1 if patched else 8)
