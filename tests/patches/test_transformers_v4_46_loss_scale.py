"""A Trainer that counts tokens over all ranks multiplies each loss by their number, also one that ignores the count."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import METHODS, Bench, Setup, reference_of, trial
from faults import FLAVOURS, canary, fault_without, where
from transformers import BertForSequenceClassification, T5ForConditionalGeneration

from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome

NAME = "transformers_v4_46_loss_scale"


def test_canary() -> None:
    canary(NAME)


@where("transformers>=4.54")
@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("method", ["bert lora", "t5 lora", "adalora", "cpt"])
def test_losses_and_parts_of_them(bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str, fsdp: int) -> None:
    """A classifier's, one that the model computes itself, a penalty beside a normalised one, and a method's own."""
    takes_counts = {"bert lora": BertForSequenceClassification, "t5 lora": T5ForConditionalGeneration}
    if method in takes_counts and "kwargs" not in inspect.signature(takes_counts[method].forward).parameters:
        pytest.skip(f"{method.split()[0]} takes no count in this release, so its loss is not multiplied")
    fault_without(NAME, bench, monkeypatch, method, Setup("scale", fsdp=fsdp), "off by")


@where("transformers>=5.10")
def test_a_forward_that_is_computed_again_gets_the_same_count(bench: Bench) -> None:
    """Units by size have FSDP1 checkpoint the full model, loss and all; its backward pass got a count in bf16."""
    setup = Setup("whole", fsdp=1, amp="bf16", wrap="size", activation_checkpointing=True)
    assert bench.cell("lora", setup, patched=True)[1].error == ""


def seen(setup: Setup, base: str, folder: str, own: bool, rank: int) -> Outcome:
    """What a loss function is given as the count in a rank, the user's own or that of the model."""
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=True)
    model = METHODS["lora"](trial.load_base(base, setup))
    counts: list[Any] = []

    def loss_of(outputs: Any, labels: Any, num_items_in_batch: Any) -> Any:
        counts.append(num_items_in_batch)
        return outputs.logits.float().mean()

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        counts.append(kwargs["num_items_in_batch"])

    if not own:
        model.get_base_model().register_forward_pre_hook(note, with_kwargs=True)
    trainer = Trainer(
        model=model,
        args=given,
        train_dataset=trial.dataset(trial.STEPS * trial.BATCH),
        compute_loss_func=loss_of if own else None,
    )
    trainer.train()
    assert given.average_tokens_across_devices
    return Outcome(extra={"counts": counts})


@where("transformers>=4.54")
def test_a_loss_function_and_a_forward_get_a_tensor(bench: Bench, tmp_path: Path) -> None:
    setup = Setup("own", fsdp=max(FLAVOURS))
    for own in (True, False):
        outcomes = forks.launch(seen, setup, bench.base, str(tmp_path), own, ranks=2)
        assert [outcome.error for outcome in outcomes] == ["", ""]
        counts = [outcome.extra["counts"] for outcome in outcomes]
        assert [{type(count).__name__ for count in mine} for mine in counts] == [{"Tensor"}, {"Tensor"}]
        assert counts[0] == counts[1]
        assert len(counts[0]) == trial.STEPS


@where("transformers>=4.54")
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_evaluation(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    """The loss that the best checkpoint is chosen by."""
    setup = Setup("evaluated", fsdp=fsdp)
    found = []
    for case, ranks in ((reference_of(setup), 1), (setup, 2)):
        outcomes = forks.launch(
            evaluated, case, bench.base_of(METHODS["bert lora"].architecture), str(tmp_path), ranks, ranks=ranks
        )
        assert not any(outcome.error for outcome in outcomes), outcomes
        found.append(outcomes[0].extra["loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def evaluated(setup: Setup, base: str, folder: str, ranks: int, rank: int) -> Outcome:
    from transformers import Trainer

    method = METHODS["bert lora"]
    given = trial.enter(setup, folder, ranks, patched=ranks > 1)
    given.per_device_eval_batch_size = trial.BATCH // ranks
    rows = method.dataset(trial.STEPS * trial.BATCH)
    torch.manual_seed(0)
    trainer = Trainer(model=method(method.load(base, setup)), args=given, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    return Outcome(extra={"loss": trainer.evaluate()["eval_loss"]})
