"""PEFT's wrap policy makes a unit of every lora_A and lora_B, and forgets the classes that the user asked for."""

from typing import Any

from faults import canary
from matrix import METHODS, Bench, Setup, trial

from trainer_fsdp_patch.trial import Outcome


def test_canary() -> None:
    canary("transformers_v5_2_fsdp_plugin")


def units(classes: list[str] | None, patched: bool, setup: Setup, base: str, folder: str, rank: int) -> Outcome:

    from torch.distributed.fsdp import FullyShardedDataParallel
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=patched)
    if classes:
        given.fsdp_plugin_args["transformer_cls_names_to_wrap"] = classes
    trainer = Trainer(model=METHODS["lora"](trial.load_base(base, setup)), args=given, train_dataset=trial.dataset(12))
    trainer.train()
    found = [type(module.module).__name__ for module in FullyShardedDataParallel.fsdp_modules(trainer.model)]
    return Outcome(extra={"units": sorted(found)})


def found(bench: Bench, folder: Any, classes: list[str] | None, *, patched: bool) -> list[str]:
    outcomes = trial.launch(units, classes, patched, Setup("u", fsdp=1), bench.base, str(folder), ranks=2)
    assert not outcomes[0].error, outcomes[0].extra
    return outcomes[0].extra["units"]


def test_one_unit_a_layer(bench: Bench, tmp_path: Any) -> None:
    stock = found(bench, tmp_path, None, patched=False)
    assert stock.count("Linear") == 8
    assert found(bench, tmp_path, None, patched=True) == ["LlamaDecoderLayer"] * 2 + ["PeftModel"]


def test_the_users_classes_win(bench: Bench, tmp_path: Any) -> None:
    assert "LlamaMLP" not in found(bench, tmp_path, ["LlamaMLP"], patched=False)
    assert found(bench, tmp_path, ["LlamaMLP"], patched=True) == ["LlamaMLP"] * 2 + ["PeftModel"]


def test_collectives_of_lora_on_fsdp1(bench: Bench) -> None:
    """No more than 2 for each of the 3 units, one all-reduce for the adapter and one for the norm."""
    stock, _ = bench.cell("lora", Setup("f1", fsdp=1), patched=False)
    patched, _ = bench.cell("lora", Setup("f1", fsdp=1), patched=True)
    assert max(patched.collectives) <= 2 * 3 + 2 < min(stock.collectives)
