"""Lets the examples be tried where there is no accelerator: two ranks on the CPU. Nothing of it is for yours."""

from __future__ import annotations

import os

import torch
from transformers import TrainingArguments


def ranks() -> int:
    """How many there are; a notebook's are started after this module may have been imported."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def needed() -> bool:
    """Whether there are fewer accelerators than ranks."""
    return bool(getattr(torch, "accelerator", torch.cuda).device_count() < ranks())


def settings() -> dict[str, object]:
    """Arguments of TrainingArguments that keep a run on the CPU; none where each rank has an accelerator."""
    return {"use_cpu": True, **({"ddp_backend": "gloo"} if ranks() > 1 else {})} if needed() else {}


def begin(arguments: TrainingArguments) -> TrainingArguments:
    """Have accelerate take CPU ranks for FSDP, which it does for accelerators alone."""
    if needed() and ranks() > 1:
        from trainer_fsdp_patch.testing import cpu

        cpu.bridge(arguments)
    return arguments
