"""A save under FSDP2 fails on 8-bit layers, and gathers the whole frozen base for a small adapter."""

import linecache
import warnings
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from cells import Bench, Setup
from faults import FLAVOURS, canary, equals_one_process, fault, fsdp2, where
from safetensors.torch import load_file


def test_canary() -> None:
    canary("accelerate_v0_30_get_state_dict")


@fsdp2
def test_8bit_layers(bench: Bench) -> None:
    fault(bench, "lora", Setup("f2-8bit", dtype="bfloat16", storage="8bit"), "no attribute 'CB'")


@fsdp2
@where("accelerate>=1.7.dev0")  # before, a stock run saves nothing under FSDP2
def test_a_save_gathers_the_embeddings_only(bench: Bench) -> None:
    """Stock gathers each of the 21 frozen tensors; we gather two (two dispatched ops each), compare and agree."""
    # One in many of stock's saves dies inside gloo, in torch's `wait_tensor` (seen once, torch 2.13).
    tries = (bench.cell("vera", Setup("f2"), patched=False)[0] for _ in range(3))
    stock = next(outcome for outcome in tries if "saved_collectives" in outcome.extra)
    patched, verdict = bench.cell("vera", Setup("f2"), patched=True)
    assert verdict.right
    assert stock.extra["saved_collectives"] >= 21
    assert patched.extra["saved_collectives"] <= 7


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


def train_something_else(trainer: Any, folder: Path) -> dict[str, Any]:
    """An optimizer that was made before the model was wrapped, as in accelerate#3256: it holds other parameters."""
    import torch

    class Elsewhere(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            self.zero_grad()
            return loss

    other = torch.nn.Parameter(torch.zeros(1))
    trainer.create_optimizer = lambda *args: setattr(trainer, "optimizer", Elsewhere([other], lr=0.1))
    trainer.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.save_model(str(folder))
    said = {str(item.message): linecache.getline(item.filename, item.lineno).strip() for item in caught}
    return {"saved": True, "said": said}


def test_an_adapter_that_no_step_moves_is_warned_of(bench: Bench) -> None:
    """https://github.com/huggingface/accelerate/issues/3256; one process saves it, and so do ranks."""
    outcomes = checkpoints.Scene(bench).run(train_something_else, Setup("f1", fsdp=1), patched=True)
    assert checkpoints.failure(outcomes) == ""
    said = {text: line for outcome in outcomes for text, line in outcome.extra["said"].items()}
    lines = [line for text, line in said.items() if "are what they were before 3 steps with gradients" in text]
    # The warning shows the user's own line, below which are transformers, accelerate and a patch.
    assert set(lines) == {"trainer.save_model(str(folder))"}
    assert checkpoints.stored_bits(outcomes[0].folder)


def test_a_learning_rate_of_zero_is_the_users_own(bench: Bench) -> None:
    scene = checkpoints.Scene(bench)
    outcomes = scene.run(checkpoints.train, Setup("f1", fsdp=1), patched=True, learning_rate=0.0)
    assert checkpoints.failure(outcomes) == ""


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_a_save_before_training(bench: Bench, fsdp: int) -> None:
    def save(trainer: Any, folder: Path) -> None:
        trainer.save_model(str(folder))

    for sharded in (False, True):
        outcomes = checkpoints.Scene(bench).run(
            save, Setup("save", fsdp=fsdp, sharded_checkpoint=sharded), patched=True
        )
        assert checkpoints.failure(outcomes) == ""
        assert checkpoints.stored_bits(outcomes[0].folder)
