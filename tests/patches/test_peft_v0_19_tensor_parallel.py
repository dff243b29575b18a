"""Loading an adapter in a distributed run imports a class that transformers 5.16 removed."""

from pathlib import Path

from cells import METHODS, Bench, Setup, trial
from faults import canary, where

from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome


def test_canary() -> None:
    canary("peft_v0_19_tensor_parallel")


def loading(patched: bool, ranks: int, setup: Setup, base: str, saved: str, rank: int) -> Outcome:
    from peft import PeftModel

    trial.enter(setup, saved, ranks, patched=patched)
    model = PeftModel.from_pretrained(trial.load_base(base, setup), saved, is_trainable=True)
    return Outcome(norms=[float(item.norm()) for name, item in model.named_parameters() if "lora_" in name])


@where("transformers>=5.16.dev0")
def test_a_saved_adapter_loads_on_every_rank(bench: Bench, tmp_path: Path) -> None:
    setup = Setup("load", fsdp=1)
    assert not trial.run(setup, METHODS["lora"], bench.base, tmp_path).error
    for outcome in forks.launch(loading, False, 2, setup, bench.base, str(tmp_path), ranks=2):
        assert "EmbeddingParallel" in outcome.error
    [alone] = forks.launch(loading, False, 1, setup, bench.base, str(tmp_path), ranks=1)
    for outcome in forks.launch(loading, True, 2, setup, bench.base, str(tmp_path), ranks=2):
        assert outcome.norms == alone.norms
    assert len(alone.norms) == 8
