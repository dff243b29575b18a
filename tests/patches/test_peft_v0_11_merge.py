"""merge_adapter() and unmerge_adapter() of a model that FSDP has sharded, as TRL's GRPO calls them for vLLM.

The replicated adapter does not fit a shard: without the patch FSDP2 mixes tensors and DTensors, and FSDP1 adds to a
view of its flat parameter. https://github.com/huggingface/trl/pull/3260
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cells import METHODS, Bench, Setup, reference_of
from faults import FLAVOURS, canary, fsdp2, packed, where

from trainer_fsdp_patch.names import unwrap
from trainer_fsdp_patch.patching import registry
from trainer_fsdp_patch.testing import forks, trial
from trainer_fsdp_patch.testing.case import Outcome

SETUPS = [
    Setup("f1", fsdp=1),
    Setup("f1-flat", fsdp=1, use_orig_params=False),
    Setup("f1-root", fsdp=1, wrap="none"),
    Setup("f1-amp", fsdp=1, amp="bf16"),
    Setup("f2"),
    Setup("f2-root", wrap="none"),
]


def test_canary() -> None:
    canary("peft_v0_11_merge")


def merged(setup: Setup, method: str, base: str, folder: str, ranks: int, rank: int) -> Outcome:
    """After each step: the loss with the adapter merged and taken out again, and the merged weights."""
    from transformers import Trainer, TrainerCallback

    given = trial.enter(setup, folder, ranks, patched=ranks > 1)
    torch.manual_seed(0)
    model = METHODS[method](trial.load_base(base, setup))
    trial.nudge(model)
    rows = trial.dataset(trial.STEPS * trial.BATCH, even=True)
    batch = {key: value[None] for key, value in rows[0].items()}
    losses: list[float] = []
    weights: dict[str, Any] = {}

    class Merge(TrainerCallback):  # type: ignore[misc]
        trainer: Any

        def forward(self) -> None:
            with torch.no_grad():
                losses.append(float(self.trainer.model_wrapped(**batch)["loss"]))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.forward()
            unwrap(self.trainer.model).merge_adapter()
            self.forward()
            whole = self.trainer.accelerator.get_state_dict(self.trainer.model_wrapped)
            weights.update({key: value.clone() for key, value in whole.items() if "base_layer" in key or "norm" in key})
            unwrap(self.trainer.model).unmerge_adapter()
            self.forward()

    callback = Merge()
    callback.trainer = Trainer(model=model, args=given, train_dataset=rows, callbacks=[callback])
    callback.trainer.train()
    return Outcome(losses=losses, extra={"weights": {} if rank else weights})


def differs(bench: Bench, folder: Path, setup: Setup, method: str) -> str:
    """The first thing that two ranks have otherwise than one process."""
    one = forks.launch(merged, reference_of(setup), method, bench.base, str(folder / "one"), 1, ranks=1)[0]
    assert not one.error, one.extra
    ours = forks.launch(merged, setup, method, bench.base, str(folder / "ranks"), 2, ranks=2)
    if ours[0].error:
        return ours[0].error
    close = {"rtol": 20 * setup.tolerance, "atol": 1e-4 if setup.tolerance < 1e-2 else 1e-2}
    if not torch.allclose(torch.tensor(ours[0].losses), torch.tensor(one.losses), rtol=setup.tolerance):
        return f"losses are {ours[0].losses} instead of {one.losses}"
    wanted, found = one.extra["weights"], ours[0].extra["weights"]
    assert wanted.keys() == found.keys()
    return next((key for key, value in wanted.items() if not torch.allclose(found[key], value, **close)), "")


@pytest.mark.parametrize("setup", [item for item in SETUPS if item.fsdp in FLAVOURS], ids=lambda item: item.name)
def test_merged_and_unmerged(bench: Bench, tmp_path: Path, setup: Setup) -> None:
    assert differs(bench, tmp_path, setup, "lora") == ""


@fsdp2
@pytest.mark.parametrize("method", ["vera", "ia3", "dora"])
@where("peft>=0.12")
def test_other_methods(bench: Bench, tmp_path: Path, method: str) -> None:
    assert differs(bench, tmp_path, Setup("f2"), method) == ""


@fsdp2
@packed
@where("peft>=0.20", "accelerate>=1.14")
def test_packed_weights(bench: Bench, tmp_path: Path) -> None:
    """Replicated ones: what FSDP does not own is merged as it is."""
    setup = Setup("f2-4bit", storage="uint8", dtype="bfloat16", amp="bf16")
    assert differs(bench, tmp_path, setup, "lora") == ""


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_without_the_patch(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsdp: int) -> None:
    monkeypatch.setenv(registry.DISABLE, "peft_v0_11_merge")
    error: Any = differs(bench, tmp_path, Setup(f"f{fsdp}", fsdp=fsdp), "lora")
    assert "mixed torch.Tensor and DTensor" in error or "must match the size" in error
