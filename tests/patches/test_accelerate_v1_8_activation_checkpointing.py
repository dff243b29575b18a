"""FSDP2's activation checkpointing recomputes with another dropout mask, and wraps the parts of adapted layers."""

import dataclasses
from pathlib import Path

import pytest
from cells import Bench, Setup, trial
from faults import canary, fault_without, where
from methods import tuned

NAME = "accelerate_v1_8_activation_checkpointing"
DROPOUT = tuned("LoraConfig", r=4, lora_dropout=0.5)


def norms(bench: Bench, folder: Path, *, checkpointed: bool, patched: bool) -> list[float]:
    setup = Setup("ac", activation_checkpointing=checkpointed)
    outcome = trial.run(setup, DROPOUT, bench.base, folder / f"{checkpointed}{patched}", patched=patched)
    return outcome.norms


def test_canary() -> None:
    canary(NAME)


def test_dropout_is_recomputed_with_the_same_mask(bench: Bench, tmp_path: Path) -> None:
    plain = norms(bench, tmp_path, checkpointed=False, patched=True)
    assert norms(bench, tmp_path, checkpointed=True, patched=True) == pytest.approx(plain, rel=1e-5)
    assert norms(bench, tmp_path, checkpointed=True, patched=False) != pytest.approx(plain, rel=1e-2)


NEW, OLD = where("accelerate>=1.15.dev0", "peft>=0.20", "torch>=2.13.dev0"), where("accelerate<1.9")
"""What is wrapped by size differs between releases of accelerate."""
BY_SIZE = Setup("f2 size ac", wrap="size", activation_checkpointing=True)


@pytest.mark.parametrize(
    ("method", "setup", "expected"),
    [
        pytest.param("lora_head", BY_SIZE, "KeyError: 0", marks=NEW),
        pytest.param("lora_embedding", BY_SIZE, "Index given to ParameterDict cannot be used", marks=OLD),
        # A dictionary of sharded tensors was a unit, whose forward nobody calls.
        pytest.param(
            "lora",
            dataclasses.replace(BY_SIZE, placement="shard", budget="60%"),
            "mixed torch.Tensor and DTensor",
            marks=NEW,
        ),
    ],
)
def test_parts_of_layers_are_not_wrapped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str, setup: Setup, expected: str
) -> None:
    fault_without(NAME, bench, monkeypatch, method, setup, expected)
