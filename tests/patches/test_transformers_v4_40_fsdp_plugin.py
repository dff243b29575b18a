"""PEFT's wrap policy makes a unit of every lora_A and lora_B; other methods with packed weights end in an error."""

from typing import Any

from faults import canary, fault, packed, where
from matrix import METHODS, Bench, Setup, trial

from trainer_fsdp_patch.trial import Outcome


def test_canary() -> None:
    canary("transformers_v4_40_fsdp_plugin")


def units(patched: bool, setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=patched)
    trainer = Trainer(model=METHODS["lora"](trial.load_base(base, setup)), args=given, train_dataset=trial.dataset(12))
    trainer.train()
    found = [type(module.module).__name__ for module in FullyShardedDataParallel.fsdp_modules(trainer.model_wrapped)]
    return Outcome(extra={"units": sorted(found)})


def found(bench: Bench, folder: Any, *, patched: bool) -> list[str]:
    outcomes = trial.launch(units, patched, Setup("u", fsdp=1), bench.base, str(folder), ranks=2)
    assert not outcomes[0].error, outcomes[0].extra
    return outcomes[0].extra["units"]


def test_one_unit_a_layer(bench: Bench, tmp_path: Any) -> None:
    assert found(bench, tmp_path, patched=False).count("Linear") == 8
    assert found(bench, tmp_path, patched=True) == ["LlamaDecoderLayer"] * 2 + ["PeftModel"]


@packed
@where("transformers<4.50.dev0", "peft>=0.14.dev0")
def test_packed_weights_of_vera(bench: Bench) -> None:
    fault(bench, "vera", Setup("f1-4bit", fsdp=1, storage="float32"), "fsdp_plugin")
