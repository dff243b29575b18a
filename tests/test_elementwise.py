"""Optimizers that read more than one element at a time get full tensors, or an error before their first step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import pytest
import torch
from cells import METHODS, Bench, Setup, trial
from faults import FLAVOURS, packed, where

from trainer_fsdp_patch.errors import AdapterError
from trainer_fsdp_patch.inspecting import elementwise
from trainer_fsdp_patch.names import canonical
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome, compare

native = where("transformers>=5.15.dev0")
HEAD = "base_model.model.lm_head.modules_to_save.default.weight"


@packed
@pytest.mark.parametrize("optim", ["adafactor", "adamw_bnb_8bit"])
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_the_placement_that_shards_leaves_their_tensors_full(
    bench: Bench, tmp_path: Path, fsdp: int, optim: str
) -> None:
    """On shards Adafactor was off by 55 % of the update, and 8-bit AdamW by more than one process allows."""
    setup = Setup("full", fsdp=fsdp, optim=optim, placement="shard")
    head = METHODS["lora_head"]
    one, two = (
        trial.run(setup, head, bench.base, tmp_path / str(ranks), ranks=ranks, patched=ranks > 1) for ranks in (1, 2)
    )
    verdict = compare(two, one, setup)
    assert verdict.error == ""


@native
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_a_natively_sharded_base_has_a_replicated_adapter(bench: Bench, method: str) -> None:
    """transformers shards no adapter: one that a plan gave to FSDP was averaged by nobody, off by 98 %."""
    scenario, scene = checkpoints.natively(METHODS[method]), checkpoints.Scene(bench)
    assert checkpoints.cell(scenario, scene, Setup("native", fsdp=0, placement="shard"), patched=True) == ""


def trained(kind: str, setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """A Trainer makes an optimizer of its own after the plan; what it raises, and whether a tensor has moved."""
    from transformers import Adafactor, Trainer

    kinds: dict[str, Any] = {"Adafactor": Adafactor, "Adadelta": torch.optim.Adadelta}

    class Own(Trainer):  # type: ignore[misc]
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = kinds[kind](
                trainable, lr=1e-3, **({"relative_step": False} if kind == "Adafactor" else {})
            )
            return self.optimizer

    given = trial.enter(setup, folder, 2, patched=True)
    model = METHODS["lora_head"](trial.load_base(base, setup))
    before = {name: item.detach().clone() for name, item in model.named_parameters() if "lora" in name}
    # An optimizer of another model is none of ours, whatever it is.
    other = torch.nn.Linear(4, 4)
    own = Adafactor(other.parameters(), lr=1e-3, relative_step=False)

    class Stepping(Own):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            other(torch.ones(4)).sum().backward()
            own.step()
            return super().training_step(*args, **kwargs)

    trainer = Stepping(model=model, args=given, train_dataset=trial.dataset(2 * trial.BATCH))
    said = ""
    try:
        trainer.train()
    except AdapterError as error:
        said = str(error)
    after = {canonical(name): item for name, item in model.named_parameters()}
    moved = any(not torch.equal(after[name].detach(), item) for name, item in before.items())
    return Outcome(extra={"said": said, "moved": moved})


@pytest.mark.parametrize("kind", ["Adafactor", "Adadelta"])
def test_one_that_is_made_after_the_plan(bench: Bench, tmp_path: Path, kind: str) -> None:
    setup = Setup("own", fsdp=1, placement="shard")
    for outcome in forks.launch(trained, kind, setup, bench.base, str(tmp_path), ranks=2):
        assert not outcome.error, outcome.extra.get("traceback")
        assert outcome.extra["moved"] == (kind == "Adadelta")
        assert (HEAD in outcome.extra["said"]) == (kind == "Adafactor")


class Other(torch.optim.AdamW):
    """One that nobody knows."""


@pytest.mark.parametrize(
    ("optimizer", "fsdp", "placement", "full"),
    [
        (torch.optim.AdamW, 1, "auto", False),
        (torch.optim.SGD, 2, "auto", False),
        (torch.optim.LBFGS, 1, "shard", True),
        (Other, 2, "auto", True),
        (Other, 2, "shard", False),
    ],
)
def test_optimizers_that_are_made_already(optimizer: Any, fsdp: int, placement: str, full: bool) -> None:
    made = optimizer([torch.nn.Parameter(torch.ones(2))])
    trainer = SimpleNamespace(optimizer=SimpleNamespace(optimizer=made), args=None)
    said = elementwise.why_not(trainer, fsdp, placement)
    assert (optimizer.__name__ in said) == full
    assert bool(said) == full


@pytest.mark.parametrize(
    ("optim", "versions"),
    [("adamw_torch_fused", {1, 2}), ("lion_32bit", {1}), ("adamw_torch_8bit", set()), ("adafactor", set())],
)
def test_optimizers_that_are_to_be_made(optim: str, versions: set[int]) -> None:
    for trainer in (
        SimpleNamespace(optimizer=None, args=SimpleNamespace(optim=optim)),
        SimpleNamespace(optimizer=None, args=SimpleNamespace(optim=SimpleNamespace(value=optim))),
    ):
        assert {version for version in (1, 2) if not elementwise.why_not(trainer, version, "shard")} == versions
