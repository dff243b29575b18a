"""A forward inside FSDP1's summon_full_params leaves the frozen base as it was, and gives what one process gives.

The user evaluates with `Seq2SeqTrainer(predict_with_generate=True)`, which generates inside a recursive summon with
writeback, or does so in a callback: https://github.com/huggingface/transformers/issues/34530,
https://github.com/huggingface/transformers/issues/21667. Stock writes a slice of each rank's shard over its start.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from architectures import ARCHITECTURES
from cells import METHODS, Bench, Setup, reference_of
from checkpoints import failure
from faults import canary

from trainer_fsdp_patch import bits
from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.names import canonical
from trainer_fsdp_patch.testing import forks, releases, trial
from trainer_fsdp_patch.testing.case import Outcome

SETUPS = [
    Setup("f1", fsdp=1),
    Setup("f1-flat", fsdp=1, use_orig_params=False),
    Setup("f1-amp", fsdp=1, amp="bf16"),
    Setup("f1-b16", fsdp=1, dtype="bfloat16", amp="bf16"),
]


def test_canary() -> None:
    canary("torch_v2_2_summon_full_params")


def frozen(model: Any) -> dict[str, bytes]:
    """Bits of the frozen parameters, whole; FSDP1's units are summoned without a forward and without writeback."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    whole: Any = contextlib.nullcontext()
    if inventory.fsdp_version(model) == 1:
        whole = FullyShardedDataParallel.summon_full_params(model, writeback=False)
    with whole:
        return {
            canonical(name): bits.bits(tensor.detach().clone()).numpy().tobytes()
            for name, tensor in model.named_parameters()
            if not tensor.requires_grad and "_flat_param" not in name
        }


def differing(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    assert before
    assert before.keys() == after.keys()
    return sorted(name for name in before if before[name] != after[name])


def trainer_of(kind: Any, model: Any, given: Any, rows: int) -> Any:
    from transformers import PrinterCallback

    trial.nudge(model)
    data = trial.dataset(rows, even=True)
    trainer = kind(model=model, args=given, train_dataset=data, eval_dataset=data[: trial.BATCH])
    trainer.remove_callback(PrinterCallback)
    trainer.label_names = ["labels"]
    return trainer


def seq2seq(setup: Setup, base: str, folder: str, ranks: int, patched: bool, rank: int) -> Outcome:
    """T5 with LoRA, evaluated by generation after each of two steps and once more."""
    from transformers import Seq2SeqTrainer

    given = trial.enter(setup, folder, ranks, patched=patched)
    given.predict_with_generate, given.generation_num_beams, given.generation_config = True, None, None
    given.generation_max_length, given.sortish_sampler, given.max_steps = 8, False, 2
    given.per_device_eval_batch_size = trial.BATCH // ranks
    model = METHODS["t5 lora"](ARCHITECTURES["t5"].load(base, setup))
    trainer = trainer_of(Seq2SeqTrainer, model, given, 2 * trial.BATCH)
    releases.evaluate_every_step(trainer)
    before: dict[str, bytes] = {}
    tokens: list[Any] = []

    def compute(prediction: Any) -> dict[str, float]:
        tokens.append(prediction.predictions.tolist())
        return {}

    upstream = trainer.evaluate

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        before.update(before or frozen(trainer.model))
        return upstream(*args, **kwargs)

    trainer.compute_metrics, trainer.evaluate = compute, evaluate
    trainer.train()
    trainer.evaluate()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    extra = {"changed": differing(before, frozen(trainer.model)), "tokens": tokens, "losses": losses}
    return Outcome(extra=extra)


@pytest.fixture
def run(bench: Bench, tmp_path: Path) -> Callable[..., list[Outcome]]:
    def run(function: Any, architecture: str, setup: Setup, *args: Any, patched: bool, ranks: int = 2) -> Any:
        base, folder = bench.base_of(ARCHITECTURES[architecture]), tmp_path / f"{ranks}-{patched}"
        return forks.launch(function, *args, setup, base, str(folder), ranks, patched, ranks=ranks)

    return run


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_predict_with_generate(run: Any, setup: Setup) -> None:
    stock, patched = (run(seq2seq, "t5", setup, patched=patched) for patched in (False, True))
    assert failure(stock) or stock[0].extra["changed"]
    assert failure(patched) == ""
    [one] = run(seq2seq, "t5", reference_of(setup), patched=False, ranks=1)
    assert not one.error, one.extra
    for outcome in patched:
        assert outcome.extra["changed"] == []
        if setup.amp == "no":
            # In bf16 a rounding may decide which of two tokens comes first.
            assert outcome.extra["tokens"] == one.extra["tokens"]
        assert outcome.extra["losses"] == pytest.approx(one.extra["losses"], rel=setup.tolerance / 10)


def greedy(model: Any, device: Any, **options: Any) -> Any:
    import torch

    prompt = torch.tensor([[5, 7, 11]], device=device)
    return model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, use_cache=False,
        pad_token_id=0, **options,
    ).tolist()  # fmt: skip


def recursive(model: Any, device: Any, summon: Any) -> Any:
    """As transformers does it, twice, and with a change of the user's in between that the next forward must see."""
    import torch

    with summon(model):
        first = greedy(model, device)
        with torch.no_grad():
            embeddings = model.get_input_embeddings().weight
            embeddings.mul_(2.0)
            doubled = greedy(model, device)
            embeddings.div_(2.0)
        return first, doubled, greedy(model, device)


def of_the_root(model: Any, device: Any, summon: Any) -> Any:
    """As TRL does it: units inside gather themselves."""
    with summon(model, recurse=False):
        return greedy(model, device)


def on_one_rank(model: Any, device: Any, summon: Any) -> Any:
    """All is there, so the main process can generate alone."""
    import os

    with summon(model, writeback=False):
        return greedy(model, device, synced_gpus=False) if os.environ.get("RANK", "0") == "0" else None


def with_gradients(model: Any, device: Any, summon: Any) -> Any:
    """A loss whose author has forgotten no_grad."""
    import torch

    ids = torch.tensor([[5, 7, 11, 3]], device=device)
    with summon(model):
        return float(model(input_ids=ids, labels=ids).loss)


def backward_inside(model: Any, device: Any, summon: Any) -> Any:
    """A gradient that is looked at, such as for an attribution."""
    import torch

    ids = torch.tensor([[5, 7, 11, 3]], device=device)
    with summon(model):
        model(input_ids=ids, labels=ids).loss.backward()
        found = max(float(item.grad.abs().max()) for item in model.parameters() if item.grad is not None)
        model.zero_grad()
    return found


def backward_outside(model: Any, device: Any, summon: Any) -> Any:
    """The same, differentiated after it."""
    import torch

    ids = torch.tensor([[5, 7, 11, 3]], device=device)
    with summon(model):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = max(float(item.grad.abs().max()) for item in model.parameters() if item.grad is not None)
    model.zero_grad()
    return found


ACTIONS = [recursive, of_the_root, on_one_rank, with_gradients, backward_inside, backward_outside]


def causal(action: Any, setup: Setup, base: str, folder: str, ranks: int, patched: bool, rank: int) -> Outcome:
    """A Llama with LoRA, and an action in a callback after the first of three steps."""
    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel
    from transformers import Trainer, TrainerCallback

    given = trial.enter(setup, folder, ranks, patched=patched)
    trainer = trainer_of(Trainer, METHODS["lora"](trial.load_base(base, setup)), given, trial.STEPS * trial.BATCH)
    found: dict[str, Any] = {}
    summon: Any = (lambda model, **_: contextlib.nullcontext()) if ranks == 1 else None

    class Act(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                before = frozen(model)
                model.eval()
                found["result"] = action(model, args.device, summon or FullyShardedDataParallel.summon_full_params)
                model.train()
                found["changed"] = differing(before, frozen(model))

    trainer.add_callback(Act())
    torch.manual_seed(0)
    trainer.train()
    found["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Outcome(extra=found)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_callback(run: Any, action: Any, setup: Setup) -> None:
    patched = run(causal, "llama", setup, action, patched=True)
    assert failure(patched) == ""
    [one] = run(causal, "llama", reference_of(setup), action, patched=False, ranks=1)
    assert not one.error, one.extra
    for outcome in patched:
        assert outcome.extra["changed"] == []
        assert outcome.extra["losses"] == pytest.approx(one.extra["losses"], rel=setup.tolerance / 10)
    found, wanted = patched[0].extra["result"], one.extra["result"]
    if isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=setup.tolerance)
    elif setup.amp == "no":
        # In bf16 a rounding may decide which of two tokens comes first.
        assert found == wanted


@pytest.mark.parametrize("action", [recursive, with_gradients], ids=lambda action: action.__name__)
def test_stock_changes_the_base(run: Any, action: Any) -> None:
    stock = run(causal, "llama", SETUPS[0], action, patched=False)
    assert failure(stock) or stock[1].extra["changed"]
