"""A save under FSDP2 fails on 8-bit layers, and gathers the whole frozen base for a small adapter."""

from pathlib import Path
from typing import Any

import pytest
from faults import FLAVOURS, canary, equals_one_process, fault, fsdp2, where
from matrix import Bench, Setup
from safetensors.torch import load_file


def test_canary() -> None:
    canary("accelerate_v0_30_get_state_dict")


@fsdp2
def test_8bit_layers(bench: Bench) -> None:
    fault(bench, "lora", Setup("f2-8bit", dtype="bfloat16", storage="8bit"), "no attribute 'CB'")


@fsdp2
@where("accelerate>=1.7.dev0")  # before, a stock run saves nothing under FSDP2
def test_a_save_gathers_the_embeddings_only(bench: Bench) -> None:
    """Stock gathers each of the 21 frozen tensors; we gather two (two dispatched ops each) and compare fingerprints."""
    stock, _ = bench.cell("vera", Setup("f2"), patched=False)
    patched, verdict = bench.cell("vera", Setup("f2"), patched=True)
    assert verdict.right
    assert stock.extra["saved_collectives"] >= 21
    assert patched.extra["saved_collectives"] <= 6


def on_embeddings(model: Any) -> Any:
    """LoRA on the embeddings, beside which peft writes the base weight too."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))


@pytest.mark.parametrize(
    "setup",
    [
        setup
        for setup in (
            Setup("f1", fsdp=1),
            Setup("f1-flat", fsdp=1, use_orig_params=False),
            Setup("f2"),
            Setup("f2-amp", amp="bf16"),
        )
        if setup.fsdp in FLAVOURS
    ],
    ids=lambda setup: setup.name,
)
def test_targeted_embeddings_are_in_the_file(bench: Bench, tmp_path: Path, setup: Setup) -> None:
    equals_one_process(bench, on_embeddings, setup, tmp_path)
    saved = load_file(tmp_path / "ranks" / "adapter_model.safetensors")
    assert any(key.endswith("embed_tokens.base_layer.weight") for key in saved)
