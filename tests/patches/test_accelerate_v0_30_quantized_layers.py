"""A program without a Trainer: `prepare` gives all ranks the base that one rank of the machine has loaded."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from cells import Bench, Setup
from faults import packed
from launched import ranks_load

from trainer_fsdp_patch.loading import streaming

pytestmark = packed


@pytest.mark.parametrize("prepared", [True, False])
def test_a_program_without_a_trainer_gets_all(bench: Bench, prepared: bool) -> None:
    """`accelerator.prepare` hands out what no plan has taken over: the forward is that of rank 0."""
    setup = Setup("f2", ram_efficient=True, dtype="bfloat16", storage="uint8")

    def logits(model: Any, rank: int) -> dict[str, Any]:
        from accelerate import Accelerator

        ids = torch.arange(8).unsqueeze(0)
        waiting = len(streaming.loaded(model))
        os.environ["ACCELERATE_USE_FSDP"] = "false"
        if prepared:
            model = Accelerator(cpu=True).prepare_model(model, evaluation_mode=True)
        return {"waiting": waiting, "logits": said(model, ids)}

    first, second = ranks_load(bench.base, setup, True, logits)
    assert first["waiting"] == second["waiting"] > 0
    # Without it the other rank has no bytes, and its output is on meta.
    assert (first["logits"] == second["logits"]) is prepared


def said(model: Any, ids: torch.Tensor) -> Any:
    try:
        return model(input_ids=ids).logits.float().tolist()
    except Exception as error:
        return type(error).__name__
