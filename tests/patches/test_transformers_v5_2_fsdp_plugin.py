"""PEFT's wrap policy makes a unit of every lora_A and lora_B, and forgets the classes that the user asked for."""

from pathlib import Path

from cells import Bench, Setup
from faults import canary, units_of


def test_canary() -> None:
    canary("transformers_v5_2_fsdp_plugin")


def test_one_unit_a_layer(bench: Bench, tmp_path: Path) -> None:
    stock = units_of(bench, tmp_path, patched=False)
    assert stock.count("Linear") == 8
    assert units_of(bench, tmp_path, patched=True) == ["LlamaDecoderLayer"] * 2 + ["PeftModel"]


def test_the_users_classes_win(bench: Bench, tmp_path: Path) -> None:
    assert "LlamaMLP" not in units_of(bench, tmp_path, ["LlamaMLP"], patched=False)
    assert units_of(bench, tmp_path, ["LlamaMLP"], patched=True) == ["LlamaMLP"] * 2 + ["PeftModel"]


def test_collectives_of_lora_on_fsdp1(bench: Bench) -> None:
    """No more than 2 for each of the 3 units, one all-reduce for the adapter and one for the norm."""
    stock, _ = bench.cell("lora", Setup("f1", fsdp=1), patched=False)
    patched, _ = bench.cell("lora", Setup("f1", fsdp=1), patched=True)
    assert max(patched.collectives) <= 2 * 3 + 2 < min(stock.collectives)
