"""PEFT's wrap policy makes a unit of every lora_A and lora_B; other methods with packed weights end in an error."""

from pathlib import Path

from cells import Bench, Setup
from faults import canary, fault, packed, units_of, where


def test_canary() -> None:
    canary("transformers_v4_40_fsdp_plugin")


def test_one_unit_a_layer(bench: Bench, tmp_path: Path) -> None:
    assert units_of(bench, tmp_path, patched=False).count("Linear") == 8
    assert units_of(bench, tmp_path, patched=True) == ["LlamaDecoderLayer"] * 2 + ["PeftModel"]


@packed
@where("transformers<4.50.dev0", "peft>=0.14.dev0")
def test_packed_weights_of_vera(bench: Bench) -> None:
    fault(bench, "vera", Setup("f1-4bit", fsdp=1, storage="float32"), "fsdp_plugin")
