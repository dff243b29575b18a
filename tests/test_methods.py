"""Methods that draw random numbers in their forward, as a user trains them: the ranks' generators run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cells import METHODS, Bench, Setup, trial
from faults import FLAVOURS
from methods import tuned
from safetensors.torch import load_file

from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome

SETTINGS = {
    "pvera": ("PveraConfig", {"r": 8, "projection_prng_key": 1}),
    "dropout": ("LoraConfig", {"lora_dropout": 0.3}),
}


@pytest.mark.parametrize("amp", ["no", "bf16"])
@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_agree_though_each_draws_noise(bench: Bench, tmp_path: Path, name: str, fsdp: int, amp: str) -> None:
    """What the noise does to a step is compared in the matrix, where ranks and one process draw the same."""
    config, settings = SETTINGS[name]
    method = tuned(config, **settings)
    if not method.exists:
        pytest.skip(f"this peft has no {config}")
    setup = Setup("noisy", fsdp=fsdp, amp=amp)
    outcomes = forks.launch(trial.train, setup, method, bench.base, str(tmp_path), 2, True, ranks=2)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    first, second = (outcome.steps for outcome in outcomes)
    for ours, theirs in zip(first, second, strict=True):
        assert all(tensor.isfinite().all() and tensor.equal(theirs[key]) for key, tensor in ours.items())
    assert any(not tensor.equal(first[-1][key]) for key, tensor in first[0].items())
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert {key for key in saved if "lambda" in key or "lora" in key}


def test_noise_is_compared_and_not_only_its_mean(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the same draws the comparison of the matrix fails, so it does see them."""
    setup = Setup("f2 fp32", fsdp=max(FLAVOURS))
    _, same = bench.cell("lora_dropout", setup, patched=True)
    assert same.right
    monkeypatch.setattr(METHODS["lora_dropout"], "callbacks", list)
    _, other = bench.cell("lora_dropout", setup, patched=True)
    assert other.error.startswith("off by")


def saved_alone(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """Train CPT, and save on rank 0 alone where one more projection moves the last bit of its parameter."""
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=True)
    model = METHODS["cpt"](trial.load_base(base, setup))
    trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(trial.STEPS * trial.BATCH, even=True))
    trainer.train()
    encoder = model.prompt_encoder["default"]
    weight = encoder.delta_embedding.weight
    for seed in range(100):
        weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        once = encoder.get_projection()
        weight.data = once
        if not encoder.get_projection().equal(once):
            break
    else:
        pytest.fail("a projection that is repeated changes no bit")
    if rank == 0:
        model.save_pretrained(folder)
    return Outcome(extra={"same": weight.equal(once)})


@pytest.mark.skipif(not METHODS["cpt"].exists, reason="this peft has no CPT")
@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_a_save_leaves_the_parameters_of_cpt(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    """Its forward rewrites them, and peft runs it in a save: a later save found ranks that differed in the last bit."""
    outcomes = forks.launch(saved_alone, Setup("cpt", fsdp=fsdp), bench.base, str(tmp_path), ranks=2)
    assert [(outcome.error, outcome.extra) for outcome in outcomes] == [("", {"same": True})] * 2
