"""RAM-efficient loading expects a DTensor for every entry; buffers and 8-bit layers cannot be one."""

from pathlib import Path
from typing import Any

import pytest
from cells import Bench, Setup, trial
from faults import NO_SHARDS, canary, equals_one_process, fault, fsdp2, where


def test_canary() -> None:
    canary("accelerate_v1_13_fsdp2_prepare_model")


@fsdp2
@pytest.mark.parametrize(("method", "setup", "expected"), NO_SHARDS)
def test_no_shards(bench: Bench, method: str, setup: Setup, expected: str) -> None:
    fault(bench, method, setup, expected)


def tied(model: Any) -> Any:
    """Token embeddings tied to the head, and a wrapper of peft's around one of them."""
    from peft import LoraConfig, get_peft_model

    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], trainable_token_indices=[1, 2, 3])
    return get_peft_model(model, config)


@fsdp2
@where("accelerate>=1.14.dev0", "torch>=2.13.dev0")
def test_tied_embeddings(bench: Bench, tmp_path: Path) -> None:
    """https://github.com/huggingface/accelerate/pull/4015"""
    setup = Setup("tied")
    stock = trial.run(setup, tied, bench.base, tmp_path / "stock", patched=False)
    assert "Invariant encountered" in stock.error
    equals_one_process(bench, tied, setup, tmp_path)


@fsdp2
@where("transformers>=5.10.dev0", "accelerate>=1.14.dev0", "torch>=2.13.dev0")
@pytest.mark.parametrize(
    ("method", "setup", "expected"),
    [
        ("bert lora", Setup("f2"), "Invariant encountered"),
        ("t5 lora", Setup("f2"), "is shared with a parameter already managed by another FSDP group"),
        ("lora", Setup("f2-size", wrap="size"), "does not support containers that do not implement forward"),
        ("llama_tied lora_tokens", Setup("f2-ram", ram_efficient=True), "neither a parameter, buffer, nor extra state"),
    ],
)
def test_what_cannot_be_a_unit(bench: Bench, method: str, setup: Setup, expected: str) -> None:
    """Embeddings inside a unit, weights shared by two, containers, and weights tied by names that peft has changed."""
    fault(bench, method, setup, expected)
