"""Lets the examples be tried where there is no accelerator: two ranks on the CPU. Nothing of it is for yours."""

from __future__ import annotations

import os

import torch
from transformers import TrainingArguments

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
NEEDED = getattr(torch, "accelerator", torch.cuda).device_count() < RANKS


def settings() -> dict[str, object]:
    """Arguments of TrainingArguments that keep a run on the CPU; none where each rank has an accelerator."""
    return {"use_cpu": True, **({"ddp_backend": "gloo"} if RANKS > 1 else {})} if NEEDED else {}


def begin(arguments: TrainingArguments) -> TrainingArguments:
    """Have accelerate take CPU ranks for FSDP, which it does for accelerators alone."""
    if NEEDED and RANKS > 1:
        from trainer_fsdp_patch.testing import cpu

        cpu.bridge(arguments)
    return arguments
