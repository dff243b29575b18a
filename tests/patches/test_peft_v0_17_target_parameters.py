"""LoRA on parameters, such as those of experts, parametrizes them in the forward, where FSDP1 has plain tensors."""

from faults import canary, fault, where
from matrix import Bench, Setup


def test_canary() -> None:
    canary("peft_v0_17_target_parameters")


# Experts are parameters of three dimensions since then.
@where("transformers>=5.0.dev0")
def test_lora_on_experts(bench: Bench) -> None:
    fault(bench, "mixtral lora_experts", Setup("f1", fsdp=1), "is invalid for input of size")
