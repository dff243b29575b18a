"""Units that mix trainable and frozen, two dtypes or packed integers cannot be flattened."""

import pytest
from faults import canary, fault
from matrix import Bench, Setup


def test_canary() -> None:
    canary("transformers_v5_2_wrap_model")


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        (Setup("f1-flat", fsdp=1, use_orig_params=False), "uniform `requires_grad`"),
        (Setup("f1-bf16", fsdp=1, dtype="bfloat16"), "uniform dtype"),
        (Setup("f1-uint8", fsdp=1, dtype="bfloat16", storage="uint8"), "Cannot flatten integer dtype"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_vera_on_fsdp1(bench: Bench, setup: Setup, expected: str) -> None:
    fault(bench, "vera", setup, expected)


def test_dora_reads_a_sharded_weight(bench: Bench) -> None:
    fault(bench, "dora", Setup("f1", fsdp=1), "tuple index out of range")


@pytest.mark.parametrize("method", ["vblora", "unilora", "tinylora"])
def test_a_parameter_shared_by_layers(bench: Bench, method: str) -> None:
    fault(bench, method, Setup("f2"), "Invariant encountered")
