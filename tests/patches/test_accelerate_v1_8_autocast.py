"""FSDP2 runs without autocast, so that fp32 projections meet bf16 activations."""

import pytest
from cells import Bench, Setup
from faults import canary, fault


def test_canary() -> None:
    canary("accelerate_v1_8_autocast")


@pytest.mark.parametrize("method", ["vera", "pvera"])
def test_mixed_precision(bench: Bench, method: str) -> None:
    fault(bench, method, Setup("f2-amp", amp="bf16"), "to have the same dtype")


def test_4bit_storage_of_another_dtype(bench: Bench) -> None:
    fault(bench, "vera", Setup("f2-4bit", storage="float32", amp="bf16"), "")


def test_the_loss_keeps_its_precision(bench: Bench) -> None:
    """Stock rounds the loss to bf16, 8 bits of mantissa, before it is logged."""
    stock, _ = bench.cell("lora", Setup("f2-loss", amp="bf16"), patched=False)
    patched, _ = bench.cell("lora", Setup("f2-loss", amp="bf16"), patched=True)
    assert all((loss * 64).is_integer() for loss in stock.losses)
    assert not all((loss * 64).is_integer() for loss in patched.losses)
