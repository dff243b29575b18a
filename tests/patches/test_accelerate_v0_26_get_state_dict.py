"""A save under FSDP2 fails on 8-bit layers, and gathers the whole frozen base for a small adapter."""

from faults import canary, fault
from matrix import Bench, Setup


def test_canary() -> None:
    canary("accelerate_v0_26_get_state_dict")


def test_8bit_layers(bench: Bench) -> None:
    fault(bench, "lora", Setup("f2-8bit", dtype="bfloat16", storage="8bit"), "no attribute 'CB'")


def test_a_save_gathers_the_embeddings_only(bench: Bench) -> None:
    """Stock gathers each of the 21 frozen tensors; we gather two (two dispatched ops each) and compare fingerprints."""
    stock, _ = bench.cell("vera", Setup("f2"), patched=False)
    patched, verdict = bench.cell("vera", Setup("f2"), patched=True)
    assert verdict.right
    assert stock.extra["saved_collectives"] >= 21
    assert patched.extra["saved_collectives"] <= 6
