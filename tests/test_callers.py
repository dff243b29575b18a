"""Public functions that are wrapped answer every caller as upstream promises; only our own save asks for less.

https://github.com/huggingface/sentence-transformers/issues/3023, https://github.com/huggingface/accelerate/issues/2904
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cells import METHODS, Bench, Setup, trial
from faults import FLAVOURS, packed
from safetensors.torch import load_file

from trainer_fsdp_patch.names import canonical
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome


class Scorer(torch.nn.Module):
    """A model of the user's own, of which an adapter is one part."""

    def __init__(self, llm: Any) -> None:
        super().__init__()
        self.llm, self.head = llm, torch.nn.Linear(trial.VOCABULARY, 1)
        self._no_split_modules = ["LlamaDecoderLayer"]

    def forward(self, input_ids: Any, labels: Any, attention_mask: Any) -> Any:
        logits = self.llm(input_ids=input_ids, attention_mask=attention_mask).logits
        return {"loss": self.head(logits).pow(2).mean(), "logits": logits}


def part_of_a_model(setup: Setup, base: str, folder: str, ranks: int, rank: int) -> Outcome:
    from transformers import Trainer

    given = trial.enter(setup, folder, ranks, patched=ranks > 1)
    given.average_tokens_across_devices = False
    torch.manual_seed(0)
    model = Scorer(METHODS["lora"](trial.load_base(base, setup)))
    trial.nudge(model)
    trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(trial.STEPS * trial.BATCH, even=True))
    trainer.train()
    trainer.save_model(folder)
    return Outcome(folder=folder)


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_a_model_of_which_the_adapter_is_a_part_is_saved_whole(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    """Base, adapter and head, by the names and with the values of one process."""
    setup = Setup("part", fsdp=fsdp)
    for ranks, name in ((1, "one"), (2, "ranks")):
        case = Setup("one", fsdp=0) if ranks == 1 else setup
        outcomes = forks.launch(part_of_a_model, case, bench.base, str(tmp_path / name), ranks, ranks=ranks)
        assert not any(outcome.error for outcome in outcomes), outcomes[0].extra
    one, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "ranks"))
    assert one.keys() == ours.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)


def by_hand(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """`accelerator.get_state_dict` as scripts call it that merge afterwards."""
    from transformers import Trainer

    given = trial.enter(setup, folder, 2, patched=True)
    torch.manual_seed(0)
    model = METHODS["lora"](trial.load_base(base, setup))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(trial.STEPS * trial.BATCH))
    trainer.train()
    found = trainer.accelerator.get_state_dict(trainer.model)
    frozen = [name for name in before if "lora_" not in name and name in found]
    changed = [name for name in frozen if not torch.equal(before[name].cpu(), found[name].to(before[name].dtype).cpu())]
    names = sorted(map(canonical, before))
    return Outcome(extra={"lacks": sorted(set(names) - set(found)) if rank == 0 else [], "changed": changed})


@pytest.mark.parametrize("fsdp", FLAVOURS)
@pytest.mark.parametrize("storage", ["", pytest.param("8bit", marks=packed), pytest.param("uint8", marks=packed)])
def test_a_state_dict_by_hand_is_whole(bench: Bench, tmp_path: Path, fsdp: int, storage: str) -> None:
    setup = Setup("hand", fsdp=fsdp, storage=storage, dtype="bfloat16" if storage else "float32")
    outcomes = forks.launch(by_hand, setup, bench.base, str(tmp_path), ranks=2)
    assert [outcome.error for outcome in outcomes] == ["", ""], outcomes[0].extra
    assert outcomes[0].extra == {"lacks": [], "changed": []}


def own_save(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """A Trainer whose `_save` is the user's own, and a model whose `generate` takes two arguments."""
    from transformers import Trainer, TrainerCallback

    class Own(Trainer):  # type: ignore[misc]
        keys: list[str] = []  # noqa: RUF012

        def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
            self.keys.extend(state_dict)

    class Generate(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            model.get_base_model().generate(torch.tensor([[1]]), 2)

    given = trial.enter(setup, folder, 2, patched=True)
    base_model = trial.load_base(base, setup)
    base_model.generate = lambda input_ids, max_new_tokens: input_ids
    model = METHODS["lora"](base_model)
    rows = trial.dataset(trial.STEPS * trial.BATCH)
    trainer = Own(model=model, args=given, train_dataset=rows, callbacks=[Generate()])
    trainer.train()
    trainer.save_model(folder)
    return Outcome(extra={"keys": trainer.keys})


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_what_users_override_gets_what_upstream_gives(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    outcomes = forks.launch(own_save, Setup("own", fsdp=fsdp), bench.base, str(tmp_path), ranks=2)
    assert [outcome.error for outcome in outcomes] == ["", ""], outcomes[0].extra
    assert any(key.endswith("mlp.up_proj.weight") for key in outcomes[0].extra["keys"])
