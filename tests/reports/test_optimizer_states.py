"""Full checkpoints of optimizers whose state is no plain tensor can be resumed, to the bits of a run that went through.

The user trains with Adafactor, Lion or an 8-bit AdamW under FSDP and resumes:
https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1381. On the rank that reads, FSDP1 asks whatever it
finds for its copy on the CPU: the step that these optimizers count in a number has none. Dictionaries, in which
bitsandbytes hides quantized state from FSDP1, come to the other ranks as placeholders, and the quantized tensors of
torchao cannot be broadcast, under FSDP2 neither.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from cells import METHODS, Bench, Setup, trial
from faults import FLAVOURS, fsdp2, packed, where

from trainer_fsdp_patch.patching import registry
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome


def some(*usual: str, long: tuple[str, ...]) -> list[Any]:
    """Optimizers that the suite runs, and those of the same kinds that only --long runs."""
    return [*usual, *(pytest.param(name, marks=pytest.mark.long) for name in long)]


NUMBERED = some("adafactor", "adamw_bnb_8bit", long=("paged_adamw_8bit", "lion_32bit", "ademamix", "rmsprop_bnb"))
"""Each counts its steps in a number; paged ones page on a GPU alone."""

OTHERS = some(
    "adamw_torch_fused", "lion_8bit", "paged_adamw_32bit",
    long=(
        "adagrad", "rmsprop", "sgd", "adamw_8bit", "ademamix_8bit", "paged_ademamix_32bit", "paged_lion_8bit",
        "rmsprop_bnb_8bit",
    ),
)  # fmt: skip


def quantized(model: Any) -> Any:
    """LoRA whose matrices have the 4,096 elements from which on optimizers quantize their state."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=64, lora_alpha=64, target_modules=["q_proj", "o_proj"]))


def interrupted(scene: checkpoints.Scene, setup: Setup, *, patched: bool) -> str:
    return checkpoints.interrupted(scene, setup, patched=patched, configure=quantized)


@pytest.fixture
def ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Stock goes wrong, one way or another; without one patch the load ends with an error, and with it all is well."""

    def ends(scenario: Any, setup: Setup, name: str, error: str) -> None:
        scene = checkpoints.Scene(bench)
        assert checkpoints.cell(scenario, scene, setup, patched=False)
        with monkeypatch.context() as context:
            context.setenv(registry.DISABLE, name)
            assert error in checkpoints.cell(scenario, scene, setup, patched=True)
        assert checkpoints.cell(scenario, scene, setup, patched=True) == ""

    return ends


def known(optim: str) -> None:
    """Skip where the installed transformers has no optimizer of that name."""
    from transformers.training_args import OptimizerNames

    if optim not in {item.value for item in OptimizerNames}:
        pytest.skip(f"this transformers has no {optim}")


@packed
@pytest.mark.parametrize("optim", NUMBERED)
def test_steps_that_are_numbers(ends: Callable[..., None], optim: str) -> None:
    known(optim)
    setup = Setup("f1", fsdp=1, optim=optim)
    ends(checkpoints.interrupted, setup, "torch_v2_2_stateless_fsdp1", "has no attribute 'cpu'")


@packed
@pytest.mark.parametrize("optim", OTHERS)
def test_every_other_optimizer(bench: Bench, optim: str) -> None:
    known(optim)
    setup = Setup("f1-flat", fsdp=1, optim=optim, use_orig_params=False)
    assert checkpoints.cell(checkpoints.interrupted, checkpoints.Scene(bench), setup, patched=True) == ""


@packed
@pytest.mark.parametrize("optim", some("adamw_bnb_8bit", long=("lion_8bit", "ademamix_8bit")))
def test_dictionaries_of_quantized_state(ends: Callable[..., None], optim: str) -> None:
    known(optim)
    ends(interrupted, Setup("f1", fsdp=1, optim=optim), "torch_v2_2_stateless_fsdp1", "has no attribute 'cpu'")


TORCHAO = [
    pytest.param("adamw_torch_4bit", 1, marks=pytest.mark.long),
    pytest.param("adamw_torch_8bit", 2, marks=[fsdp2, pytest.mark.long]),
]
"""torchao compiles each of them, for a minute."""


@where("torchao>=0.18", "transformers>=5.0.dev0")
@pytest.mark.parametrize(("optim", "fsdp"), TORCHAO)
def test_quantized_tensors(ends: Callable[..., None], optim: str, fsdp: int) -> None:
    known(optim)
    name = "torch_v2_2_stateless_fsdp1" if fsdp == 1 else "torch_v2_2_stateless_optimizer"
    ends(interrupted, Setup(f"f{fsdp}", fsdp=fsdp, optim=optim), name, "attempting to run unimplemented operator")


@packed
@pytest.mark.parametrize("sharded", [False, True], ids=["full", "sharded"])
@pytest.mark.parametrize("fsdp", [1, pytest.param(2, marks=fsdp2)])
def test_other_checkpoints(bench: Bench, fsdp: int, sharded: bool) -> None:
    """Those that torch can read: numbers and dictionaries in sharded ones, and under FSDP2."""
    if fsdp == 1 and not sharded:
        pytest.skip("tested above")
    setup = Setup(f"f{fsdp}", fsdp=fsdp, sharded_checkpoint=sharded, optim="adamw_bnb_8bit")
    assert checkpoints.cell(interrupted, checkpoints.Scene(bench), setup, patched=True) == ""


@pytest.mark.parametrize("sharded", [False, True], ids=["full", "sharded"])
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_parameters_that_no_batch_has_reached(bench: Bench, fsdp: int, sharded: bool) -> None:
    """LoRA on a vision tower, and batches of text alone: torch refused the checkpoint for what had no state.

    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/checkpoint/state_dict.py#L1036
    """
    setup = Setup(f"f{fsdp} {sharded}", fsdp=fsdp, sharded_checkpoint=sharded)
    assert bench.resumed(with_an_idle_layer, setup, "idle", patched=True) == ""


@fsdp2
def test_torch_refuses_them(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.DISABLE, "torch_v2_2_stateless_optimizer")
    said = bench.resumed(with_an_idle_layer, Setup("f2 idle", fsdp=2), "idle", patched=True)
    assert "Missing optimizer state for parameter" in said


def by_hand(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """Torch's own functions, called by a user after training: without a state, without its name too, in a list."""
    from torch.distributed.checkpoint import state_dict
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=True)
    model = METHODS["lora"](trial.load_base(base, setup))
    trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(trial.STEPS * trial.BATCH))
    trainer.train()
    wrapped, optimizer = trainer.model_wrapped, trainer.optimizer.optimizer
    options = state_dict.StateDictOptions(full_state_dict=not setup.sharded_checkpoint)
    said = []
    for forgotten in ("list", "state", "name"):
        found = state_dict.get_optimizer_state_dict(wrapped, optimizer, options=options)
        name = next(iter(found["state"]))
        if forgotten != "list":
            del found["state"][name]
        if forgotten == "name":
            for group in found["param_groups"]:
                group["params"] = [item for item in group["params"] if item != name]
        several = [optimizer] if forgotten == "list" else optimizer
        try:
            state_dict.set_optimizer_state_dict(wrapped, several, found, options=options)
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
    return Outcome(extra={"said": said})


@fsdp2
@where("torch>=2.13.dev0")
@pytest.mark.parametrize("sharded", [False, True], ids=["full", "sharded"])
def test_what_a_checkpoint_does_not_list_is_refused(bench: Bench, tmp_path: Path, sharded: bool) -> None:
    setup = Setup("by hand", fsdp=2, sharded_checkpoint=sharded)
    for outcome in forks.launch(by_hand, setup, bench.base, str(tmp_path), ranks=2):
        assert not outcome.error, outcome.extra
        several, idle, unlisted = outcome.extra["said"]
        assert (idle, several) == ("", "")
        assert "Missing optimizer state for parameter" in unlisted


@fsdp2
def test_a_group_without_parameters_keeps_its_settings(bench: Bench) -> None:
    """Biases alone leave the Trainer's group with weight decay empty; the first step after resuming missed "betas"."""
    setup = Setup("f2 empty", fsdp=2, sharded_checkpoint=True)
    assert bench.resumed(biases_alone, setup, "biases", patched=True) == ""


def biases_alone(model: Any) -> Any:
    """LoRA whose matrices are frozen, and biases that are trained."""
    import peft
    import torch

    for layer in model.model.layers:
        layer.self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(layer.self_attn.q_proj.out_features))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], bias="all"))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad = name.endswith("bias")
    return adapted


def with_an_idle_layer(model: Any) -> Any:
    """LoRA, on a layer too that no forward asks."""
    import peft
    import torch

    model.idle = torch.nn.Linear(64, 64)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "idle"]))
