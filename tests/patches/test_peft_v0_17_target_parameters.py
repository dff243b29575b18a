"""LoRA on parameters, such as those of experts, parametrizes them in the forward, where FSDP1 has plain tensors."""

import pytest
from cells import Bench, Setup
from faults import canary, fault_without, where

NAME = "peft_v0_17_target_parameters"


def test_canary() -> None:
    canary(NAME)


# Experts are parameters of three dimensions since then.
@where("transformers>=5.0.dev0")
def test_lora_on_experts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "Module already has an attribute named 'down_proj'"
    fault_without(NAME, bench, monkeypatch, "mixtral lora_experts", Setup("f1", fsdp=1), expected)
