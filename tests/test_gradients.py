"""Who calls backward does not matter: replicated gradients are averaged once at the end of each pass that synchronises.

https://github.com/huggingface/accelerate/issues/2953
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import METHODS, Bench, Setup, reference_of, trial
from faults import FLAVOURS

from trainer_fsdp_patch.ranks import collectives
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome, compare

Step = Callable[[Any, Any, Any], Any]


def plain(trainer: Any, model: Any, inputs: Any) -> Any:
    """`loss.backward()`, as training steps of users' own have it."""
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach()


def in_two(trainer: Any, model: Any, inputs: Any) -> Any:
    """Two passes a step."""
    for share in (0.25, 0.75):
        loss = model(**inputs).loss
        (share * loss).backward()
    return loss.detach()


def reads_gradients(trainer: Any, model: Any, inputs: Any) -> Any:
    """A `.grad` that is read between backward and step is the average of all ranks."""
    loss = plain(trainer, model, inputs)
    gradients = torch.cat([item.grad.reshape(-1) for item in model.parameters() if item.grad is not None])
    trainer.seen.append(gradients.clone())
    return loss


def asks_for_gradients(trainer: Any, model: Any, inputs: Any) -> Any:
    """`torch.autograd.grad` accumulates nothing, so nothing is averaged for it; FSDP1 itself allows one pass alone."""
    loss = model(**inputs).loss
    trained = [item for item in model.parameters() if item.requires_grad and item.numel()]
    torch.autograd.grad(loss, trained[:1], retain_graph=True, allow_unused=True)
    loss.backward()
    return loss.detach()


def without_sync(trainer: Any, model: Any, inputs: Any) -> Any:
    """A first half under FSDP's `no_sync()`, which accelerate's flag knows nothing of, and a second without."""
    with trainer.accelerator.no_sync(model):
        (0.5 * model(**inputs).loss).backward()
    loss = model(**inputs).loss
    (0.5 * loss).backward()
    return loss.detach()


def in_a_mapping(trainer: Any, model: Any, inputs: Any) -> Any:
    """Outputs in a mapping that torch's pytrees do not know, as a CrossEncoder has them, and a root that is freed."""
    from transformers import BatchEncoding

    if not trainer.seen:
        inner = trainer.accelerator.unwrap_model(model)
        inner.register_forward_hook(lambda _, __, output: BatchEncoding({"loss": output.loss}), prepend=True)
        if hasattr(model, "set_reshard_after_forward"):
            model.set_reshard_after_forward(True, recurse=False)
        trainer.seen.append(torch.ones(()))
    loss = model(**inputs)["loss"]
    loss.backward()
    return loss.detach()


def run(step: Step, setup: Setup, base: str, folder: str, ranks: int, rank: int) -> Outcome:
    """Train with a training step of the user's own; counts the averages of each step."""
    from transformers import Trainer

    given = trial.enter(setup, folder, ranks, patched=ranks > 1)
    given.average_tokens_across_devices = False
    counted: list[int] = []
    upstream = collectives.average_gradients
    collectives.average_gradients = lambda *args: counted.append(upstream(*args))  # type: ignore[assignment, func-returns-value]
    per_step: list[int] = []

    class Own(Trainer):  # type: ignore[misc]
        seen: list[Any] = []  # noqa: RUF012

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            counted.clear()
            model.train()
            loss = step(self, model, self._prepare_inputs(inputs))
            per_step.append(len(counted))
            return loss

    torch.manual_seed(0)
    model = METHODS["lora"](trial.load_base(base, setup))
    trial.nudge(model)
    rows = trial.dataset(trial.STEPS * trial.BATCH, even=True)
    trainer = Own(model=model, args=given, train_dataset=rows)
    if ranks == 1:
        trainer.save_model(f"{folder}/init")
    trainer.train()
    trainer.save_model(folder)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return Outcome(folder=folder, norms=norms, extra={"averages": per_step, "seen": trainer.seen})


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize(
    ("step", "averages"),
    [(plain, 1), (in_two, 2), (reads_gradients, 1), (asks_for_gradients, 1), (without_sync, 1), (in_a_mapping, 1)],
)
def test_a_training_step_of_the_users_own(bench: Bench, tmp_path: Path, step: Step, averages: int, fsdp: int) -> None:
    if step is asks_for_gradients and fsdp == 1:
        pytest.skip("FSDP1 frees what a second pass over the graph needs")
    setup = Setup(step.__name__, fsdp=fsdp)
    [one] = forks.launch(run, step, reference_of(setup), bench.base, str(tmp_path / "one"), 1, ranks=1)
    assert not one.error, one.extra
    outcomes = forks.launch(run, step, setup, bench.base, str(tmp_path / "ranks"), 2, ranks=2)
    assert [outcome.error for outcome in outcomes] == ["", ""], outcomes[0].extra
    verdict = compare(outcomes[0], one, setup)
    assert verdict.right, verdict.error
    for outcome in outcomes:
        assert outcome.extra["averages"] == [averages] * trial.STEPS
        for ours, theirs in zip(outcome.extra["seen"], one.extra["seen"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_a_pass_within_a_checkpointed_region_is_not_the_end(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    """Reentrant checkpointing runs a pass of its own for each layer: still one average a step."""
    setup = Setup("reentrant", fsdp=fsdp, checkpointing=True)

    def reentrant(trainer: Any, model: Any, inputs: Any) -> Any:
        if trainer.state.global_step == 0:
            inner = trainer.accelerator.unwrap_model(model)
            inner.gradient_checkpointing_enable({"use_reentrant": True})
            inner.enable_input_require_grads()
        return plain(trainer, model, inputs)

    one = forks.launch(run, plain, reference_of(dataclasses.replace(setup, checkpointing=False)), bench.base,
                       str(tmp_path / "one"), 1, ranks=1)[0]  # fmt: skip
    assert not one.error, one.extra
    outcomes = forks.launch(run, reentrant, setup, bench.base, str(tmp_path / "ranks"), 2, ranks=2)
    assert [outcome.error for outcome in outcomes] == ["", ""], outcomes[0].extra
    assert outcomes[0].extra["averages"] == [1] * trial.STEPS
    verdict = compare(outcomes[0], one, setup)
    assert verdict.right, verdict.error


def without_the_adapter(trainer: Any, model: Any, inputs: Any, *, inside: bool = False, plainly: bool = True) -> Any:
    """Rank 1's loss reaches no tensor of the adapter; one process takes both halves of the batch.

    `inside`: backward is called while the adapter is disabled, and so frozen. `plainly`: on the loss.
    """
    ranks, rank = trainer.args.world_size, trainer.args.process_index
    halves = [inputs]
    if ranks == 1:
        halves = [{key: part[rows] for key, part in inputs.items()} for rows in (slice(2), slice(2, None))]
    inner = trainer.accelerator.unwrap_model(model)
    if trainer.state.global_step == 0:
        # As gradient checkpointing has it: a loss without the adapter has a graph all the same.
        inner.enable_input_require_grads()
    for part, half in enumerate(halves, rank):
        with contextlib.ExitStack() as disabled:
            if part == 1:
                disabled.enter_context(inner.disable_adapter())
            loss = model(**half).loss
            if not inside:
                disabled.close()
            (torch.Tensor.backward if plainly else trainer.accelerator.backward)(loss / len(halves))
    return loss.detach()


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("plainly", [True, False], ids=["loss.backward", "accelerator.backward"])
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_a_rank_whose_loss_misses_the_adapter_takes_part(
    bench: Bench, tmp_path: Path, inside: bool, plainly: bool, fsdp: int
) -> None:
    """Its gradient counts as zero, as under DDP, and it steps as the others do."""
    setup = Setup("missing", fsdp=fsdp)
    step = functools.partial(without_the_adapter, inside=inside, plainly=plainly)
    one, outcomes = both(functools.partial(run, step), setup, bench, tmp_path)
    for outcome in outcomes:
        assert outcome.extra["averages"] == [1] * trial.STEPS
    # Each rank logs the mean of the losses, one process the last one alone.
    verdict = compare(dataclasses.replace(outcomes[0], losses=[]), one, setup)
    assert verdict.right, verdict.error


def both(train: Any, setup: Setup, bench: Bench, folder: Path) -> tuple[Outcome, list[Outcome]]:
    """The same training in one process and on two ranks."""
    [one] = forks.launch(train, reference_of(setup), bench.base, str(folder / "one"), 1, ranks=1)
    assert not one.error, one.extra
    outcomes = forks.launch(train, setup, bench.base, str(folder / "ranks"), 2, ranks=2)
    assert [outcome.error for outcome in outcomes] == ["", ""], outcomes[0].extra
    return one, outcomes


def two_models(step: Step, planned: bool, setup: Setup, base: str, folder: str, ranks: int, rank: int) -> Outcome:
    """Train a second model with an optimizer of its own, wrapped as the Trainer does its own or by accelerate alone."""
    second = METHODS["lora_head"](trial.load_base(base, setup))
    trial.nudge(second)
    trained = {name: item for name, item in second.named_parameters() if item.requires_grad}
    before = {name: item.detach().clone() for name, item in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-2, eps=1e-2)
    prepared: list[Any] = []

    def with_a_second(trainer: Any, model: Any, inputs: Any) -> Any:
        if not prepared:
            wrapped = trainer._wrap_model(second) if planned else second
            prepared.extend((*trainer.accelerator.prepare(wrapped, optimizer), trainer.accelerator))
        prepared[0].train()
        loss = step(trainer, (model, prepared[0]), inputs)
        prepared[1].step()
        prepared[1].zero_grad()
        return loss

    outcome = run(with_a_second, setup, base, folder, ranks, rank)
    after = prepared[2].get_state_dict(prepared[0])
    outcome.extra["second"] = {name: (before[name], after[name]) for name in trained if name in after}
    return outcome


def sum_of_both(trainer: Any, models: Any, inputs: Any) -> Any:
    first, second = (model(**inputs).loss for model in models)
    (first + second).backward()
    return first.detach()


def one_after_the_other(trainer: Any, models: Any, inputs: Any) -> Any:
    first, second = (model(**inputs).loss for model in models)
    first.backward()
    second.backward()
    return first.detach()


def by_accelerate(trainer: Any, models: Any, inputs: Any) -> Any:
    first, second = (model(**inputs).loss for model in models)
    trainer.accelerator.backward(first + second)
    return first.detach()


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("planned", [True, False], ids=["planned", "not planned"])
@pytest.mark.parametrize("step", [sum_of_both, one_after_the_other, by_accelerate])
def test_two_models_in_one_accelerator(bench: Bench, tmp_path: Path, step: Step, planned: bool, fsdp: int) -> None:
    """Each that was planned is averaged once a step, whoever calls backward; FSDP has the other to itself."""
    setup = Setup(step.__name__, fsdp=fsdp)
    one, outcomes = both(functools.partial(two_models, step, planned), setup, bench, tmp_path)
    verdict = compare(outcomes[0], one, setup)
    assert verdict.right, verdict.error
    for outcome in outcomes:
        assert outcome.extra["averages"] == [1 + planned] * trial.STEPS
    ours = outcomes[0].extra["second"]
    assert ours.keys() == one.extra["second"].keys() != set()
    for name, (before, wanted) in one.extra["second"].items():
        assert (ours[name][1] - wanted).norm() <= setup.tolerance * (wanted - before).norm(), name
