"""Names of modules_to_save, trainable tokens and embeddings have FSDP's segments in them, and peft looks for them."""

from pathlib import Path
from typing import Any

from cells import Bench, Setup, trial
from faults import canary, equals_one_process, where

from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import compare


def test_canary() -> None:
    canary("peft_v0_11_state_dict_names")


def norms_to_save(model: Any) -> Any:
    """Copies of modules that lie inside FSDP's units."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], modules_to_save=["input_layernorm"])
    return get_peft_model(model, config)


@where("peft>=0.15.dev0")
def test_modules_inside_units_are_saved(bench: Bench, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(forks, "TIMEOUT", 20.0)
    setup = Setup("aux", fsdp=1)
    stock = trial.run(setup, norms_to_save, bench.base, tmp_path / "stock", patched=False)
    if not stock.error:
        one = trial.run(setup, norms_to_save, bench.base, tmp_path / "first", ranks=1, patched=False)
        assert compare(stock, one, setup).error
    equals_one_process(bench, norms_to_save, setup, tmp_path)
