"""Buffers and 8-bit layers are taken for shards, and the frozen base is cast to fp32."""

from pathlib import Path

import pytest
import torch
from cells import METHODS, Bench, Setup, trial
from faults import NO_SHARDS, canary, fault, fsdp2, packed, where

from trainer_fsdp_patch import devices, versions
from trainer_fsdp_patch.packing import state_dict
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome


def test_canary() -> None:
    canary("accelerate_v1_6_fsdp2_prepare_model")


@fsdp2
@pytest.mark.parametrize(("method", "setup", "expected"), NO_SHARDS)
def test_no_shards(bench: Bench, method: str, setup: Setup, expected: str) -> None:
    if setup.ram_efficient and not versions.at_least("accelerate", "1.8.0"):
        pytest.skip("accelerate before 1.8 asks for CUDA by name")
    fault(bench, method, setup, expected)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes: packed weights spell NaN here and there, which equals nothing."""
    return tensor.detach().contiguous().view(torch.uint8)


def dtypes(patched: bool, setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """Dtypes and bytes of the frozen base before and after a run."""
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=patched)
    model = METHODS["lora"](trial.load_base(base, setup))
    before = {name: item.detach().clone() for name, item in model.named_parameters() if not item.requires_grad}
    Trainer(model=model, args=given, train_dataset=trial.dataset(trial.STEPS * trial.BATCH)).train()
    frozen = {name: item for name, item in model.named_parameters() if not item.requires_grad}
    full = {name: item.full_tensor() if hasattr(item, "full_tensor") else item for name, item in frozen.items()}
    # A quantized layer has its weight back from its packed bytes.
    after = state_dict.as_saved(model, full)
    changed = []
    for name, item in before.items():
        same = after[name].dtype == item.dtype and raw(after[name]).equal(raw(item))
        changed += [] if same else [f"{name} {after[name].dtype}"]
    return Outcome(extra={"changed": changed, "names": len(before)})


@fsdp2
@pytest.mark.parametrize("storage", ["", pytest.param("bfloat16", marks=packed)])
def test_the_frozen_base_keeps_its_bits(bench: Bench, tmp_path: Path, storage: str) -> None:
    setup = Setup("bits", dtype="bfloat16", storage=storage, amp="bf16")
    [patched, _] = forks.launch(dtypes, True, setup, bench.base, str(tmp_path), ranks=2)
    assert not patched.error, patched.extra
    assert patched.extra["names"] > 10
    assert patched.extra["changed"] == []
    [stock, _] = forks.launch(dtypes, False, setup, bench.base, str(tmp_path), ranks=2)
    assert not stock.error, stock.extra
    assert any("float32" in line for line in stock.extra["changed"])


@where("accelerate>=1.11.dev0", "torch<2.7.dev0")
def test_a_torch_that_cannot_ignore_parameters(bench: Bench, tmp_path: Path) -> None:
    """On CPU ranks such a torch shards and then lacks an event for its streams, on GPUs it trains."""
    stock = trial.run(Setup("f2"), METHODS["lora"], bench.base, tmp_path / "stock", patched=False)
    assert "ignored_params" in stock.error
    patched = trial.run(Setup("f2"), METHODS["lora"], bench.base, tmp_path / "patched")
    assert "record_event" in patched.error if devices.kind() == "cpu" else not patched.error
