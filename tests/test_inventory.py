"""The inventory of a model: taken once for a plan, once more where FSDP2 takes the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cells import METHODS, Bench, Setup
from faults import FLAVOURS
from test_plan import llama

from trainer_fsdp_patch.inspecting import inventory, walk
from trainer_fsdp_patch.testing import forks, trial
from trainer_fsdp_patch.testing.case import Outcome


def counted(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """How often the model was walked until its first forward."""
    from transformers import TrainerCallback

    upstream, calls, extra = walk.take, [], {}

    def take(model: Any) -> Any:
        calls.append(model)
        return upstream(model)

    class AtTheFirstStep(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            extra.setdefault("walks", len(calls))

    given = trial.enter(setup, folder, 2, patched=True)
    from transformers import Trainer

    walk.take = take
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


class Packed(torch.nn.Module):
    """Stands for a quantizer's layer that makes its tensors anew where it is moved, as HQQ's does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)

    def to(self, device: Any) -> Packed:
        self.weight = torch.nn.Parameter(self.weight.clone(), requires_grad=False)
        return self


def moved(rank: int) -> Outcome:
    """Whether the record holds the tensors that a quantized layer has after it was moved."""
    import torch.distributed as dist

    from trainer_fsdp_patch.planning.plan import make_plan
    from trainer_fsdp_patch.planning.prepared import Prepared
    from trainer_fsdp_patch.preparing import prepare

    dist.init_process_group("gloo")
    model = llama()
    model.packed = Packed()
    before, model = model.packed.weight, METHODS["lora"](model)
    taken = inventory.take(model)
    prepared = Prepared(model, make_plan(model, inventory=taken), [None], taken)
    # Another spelling of where the tensors are already, so that the layer is moved without a GPU.
    prepare.materialize(prepared, torch.device("cpu", 0), taken)
    after = next(module for module in model.modules() if isinstance(module, Packed)).weight
    return Outcome(extra={"replaced": after is not before, "known": id(after) in prepared.known})


def test_the_record_holds_what_a_moved_layer_has_made_anew() -> None:
    for outcome in forks.launch(moved, ranks=2):
        assert not outcome.error, outcome.extra
        assert outcome.extra == {"replaced": True, "known": True}
