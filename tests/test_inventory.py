"""The inventory of a model: taken once for a plan, once more where FSDP2 takes the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cells import METHODS, Bench, Setup
from faults import FLAVOURS
from test_plan import llama

from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.testing import forks, trial
from trainer_fsdp_patch.testing.case import Outcome


def counted(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """How often all tensors of the model were looked for until its first forward."""
    from transformers import TrainerCallback

    upstream, calls, extra = inventory.named_tensors, [], {}

    def named_tensors(model: Any) -> Any:
        calls.append(model)
        return upstream(model)

    class AtTheFirstStep(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            extra.setdefault("walks", len(calls))

    given = trial.enter(setup, folder, 2, patched=True)
    from transformers import Trainer

    inventory.named_tensors = named_tensors
    model = METHODS["lora"](trial.load_base(base, setup))
    Trainer(model=model, args=given, train_dataset=trial.dataset(12), callbacks=[AtTheFirstStep()]).train()
    return Outcome(extra=extra)


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_one_walk_serves_a_whole_prepare(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    for outcome in forks.launch(counted, Setup("walks", fsdp=fsdp), bench.base, str(tmp_path), ranks=2):
        assert not outcome.error, outcome.extra
        assert outcome.extra["walks"] == fsdp


def test_slots_are_read_again_without_a_walk() -> None:
    model = METHODS["lora"](llama())
    taken = inventory.take(model)
    slot = next(slot for slot in taken.slots if slot.name.endswith("q_proj.lora_A.default.weight"))
    slot.module.weight = torch.nn.Parameter(slot.tensor.detach().clone())
    again = next(item for item in taken.reread().slots if item.name == slot.name)
    assert again.tensor is slot.module.weight is not slot.tensor
    assert taken.names_of([slot.tensor]) == {slot.name}
