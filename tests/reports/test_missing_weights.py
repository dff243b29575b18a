"""Weights that no file holds, such as a classifier's head, under RAM-efficient loading: rank 0 alone has made them.

TRL's reward_modeling.py does this with TRL's own fsdp2.yaml.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from cells import Bench, Setup, reference_of, trial
from faults import fsdp2, where

from trainer_fsdp_patch.testing.case import compare


def rewards(model: Any) -> Any:
    """LoRA on a classifier whose head was made while it was loaded."""
    from peft import LoraConfig, get_peft_model

    model.config.pad_token_id = 0
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="SEQ_CLS"))


def load(folder: str, setup: Setup) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    if setup.fsdp:
        # As accelerate launch sets it, and with it from_pretrained leaves all ranks but the first without weights.
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    torch.manual_seed(0)
    return trial.load_base(folder, setup, kind=AutoModelForSequenceClassification)


def rows(size: int) -> list[dict[str, Any]]:
    return [{**row, "labels": index % 2} for index, row in enumerate(trial.dataset(size, even=True))]


rewards.load, rewards.dataset, rewards.even = load, rows, True  # type: ignore[attr-defined]


@fsdp2
@where("transformers>=5.0")
@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_a_head_that_no_file_holds(bench: Bench, tmp_path: Path, amp: str) -> None:
    setup = Setup("head", ram_efficient=True, amp=amp)
    one = trial.run(reference_of(setup), rewards, bench.base, tmp_path / "one", ranks=1, patched=False)
    assert not one.error, one.extra
    verdict = compare(trial.run(setup, rewards, bench.base, tmp_path / "ranks"), one, setup)
    assert verdict.right, verdict.error
