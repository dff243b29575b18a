"""FSDP1's activation checkpointing wraps the parts of adapted layers, in which peft no longer finds its adapter."""

from __future__ import annotations

import pytest
from cells import Bench, Setup
from faults import canary, fault_without

NAME = "torch_v2_2_activation_checkpointing"


def test_canary() -> None:
    canary(NAME)


def test_dictionaries_of_an_adapter_are_not_wrapped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft asks a dictionary by `in`; the saved file lacks the embedding too, whose class peft does not see."""
    setup = Setup("f1 none ac", fsdp=1, wrap="none", activation_checkpointing=True)
    fault_without(NAME, bench, monkeypatch, "lora_embedding", setup, "Index given to ParameterDict cannot be used")


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
