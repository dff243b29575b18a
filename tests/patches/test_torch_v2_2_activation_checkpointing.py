"""FSDP1's activation checkpointing wraps the parts of adapted layers, in which peft no longer finds its adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from cells import METHODS, Bench, Setup, trial
from faults import canary, fault_without, skip_without_reference

from trainer_fsdp_patch.names import canonical
from trainer_fsdp_patch.patching import registry
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome

NAME = "torch_v2_2_activation_checkpointing"


def test_canary() -> None:
    canary(NAME)


def test_dictionaries_of_an_adapter_are_not_wrapped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft asks a dictionary by `in`; the saved file lacks the embedding too, whose class peft does not see."""
    setup = Setup("f1 none ac", fsdp=1, wrap="none", activation_checkpointing=True)
    fault_without(NAME, bench, monkeypatch, "lora_embedding", setup, "Index given to ParameterDict cannot be used")


def test_ranks_gather_in_one_order(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks' parts of a quantized layer differ in size, and what they checkpointed did: gloo ends, NCCL waits."""
    setup = Setup("f1 gptq size ac", fsdp=1, quantizer="gptq", wrap="size", activation_checkpointing=True)
    skip_without_reference(bench, "lora", setup)
    with monkeypatch.context() as context:
        context.setenv(registry.DISABLE, NAME)
        _, others = bench.cell("lora", setup, patched=True)
    assert others.error
    assert bench.cell("lora", setup, patched=True)[1].error == ""


def checkpointed(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """Names of the modules that a rank checkpoints; nothing is trained."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=True)
    model = METHODS["lora"](trial.load_base(base, setup))
    trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(4))
    model = trainer.accelerator.prepare(trainer._wrap_model(trainer.model))
    names = {canonical(name) for name, item in model.named_modules() if isinstance(item, ActivationWrapper)}
    return Outcome(extra={"names": sorted(name.removeprefix("base_model.model.") for name in names)})


LAYERS = ["model.layers.0", "model.layers.1"]
PARTS = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn", "self_attn.o_proj", "self_attn.q_proj"]
UNITS = ["lm_head", "model.embed_tokens", *(f"{layer}.{part}" for layer in LAYERS for part in PARTS)]


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        (Setup("units", fsdp=1, wrap="size"), UNITS),
        (Setup("half of the layers", fsdp=1, budget="50%"), LAYERS),
        (Setup("all", fsdp=1, wrap="size", budget="100%"), LAYERS),
    ],
    ids=lambda item: getattr(item, "name", ""),
)
def test_ranks_checkpoint_the_same_modules(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: Setup, expected: list[str]
) -> None:
    """By size each rank counted its own part of a module; a layer that base_budget keeps full was left out."""
    setup = dataclasses.replace(setup, activation_checkpointing=True)
    outcomes = forks.launch(checkpointed, setup, bench.base, str(tmp_path), ranks=2)
    assert [(outcome.error, outcome.extra) for outcome in outcomes] == [("", {"names": expected})] * 2
    monkeypatch.setenv(registry.DISABLE, NAME)
    outcomes = forks.launch(checkpointed, setup, bench.base, str(tmp_path), ranks=2)
    assert all(outcome.extra["names"] != expected for outcome in outcomes)


def test_modules_that_a_user_names_are_wrapped() -> None:
    """`check_fn` is the user's own choice; of what accelerate asks for, parts of adapted layers are left out."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as torchs

    from trainer_fsdp_patch.preparing import checkpointing

    def wrapped(**kwargs: object) -> list[str]:
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
        checkpointing.apply(torchs.apply_activation_checkpointing, model, **kwargs)
        ends = [name for name, item in model.named_modules() if isinstance(item, torchs.ActivationWrapper)]
        return [name.removeprefix("base_model.").replace("_checkpoint_wrapped_module.", "") for name in ends]

    assert "model.0.base_layer" in wrapped(check_fn=lambda module: isinstance(module, torch.nn.Linear))
    assert "model.0" in wrapped()
    assert not [name for name in wrapped() if name.startswith("model.0.")]
