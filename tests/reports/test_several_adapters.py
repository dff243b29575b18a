"""Several adapters on one base: by task, a reference, the next task's, loaded, mixed, deleted, swapped.

Before transformers 5 a second `train()` unwraps what FSDP1 has wrapped and fails: transformers#34113.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cases
import pytest
from cases import FSDP1, FSDP2, Case, Found, Scene, Setup

FLAT = Setup("FSDP1 flat", fsdp=1, use_orig_params=False)


def lora(**settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "target_modules": ["q_proj", "o_proj"], **settings}
    return lambda model: get_peft_model(model, LoraConfig(**settings))


def with_another(model: Any) -> Any:
    from peft import LoraConfig

    model = lora()(model)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    return model


def peft_model(trainer: Any) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)


def stored(scene: Scene) -> Path:
    """The folder of an adapter that was saved before, with values of its own."""
    model = scene.model(lora())
    folder = scene.folder / f"stored-{scene.rank}"
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)
    model.save_pretrained(folder)
    return folder


def by_task(scene: Scene) -> Found:
    from transformers import Trainer

    class Tasks(Trainer):  # type: ignore[misc]
        calls = 0

        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            self.accelerator.unwrap_model(model).set_adapter(["default", "other"][self.calls % 2])
            self.calls += 1
            return super().compute_loss(model, *args, **kwargs)

    trainer = scene.trainer(scene.model(with_another), Tasks)
    found = scene.trained(trainer)
    trainer.save_model()
    return {**found, "file": scene.written(), "other": scene.written("other")}


def with_reference(scene: Scene) -> Found:
    import torch
    from peft import PeftModel
    from transformers import Trainer

    class Preferences(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, True)
            adapters = self.accelerator.unwrap_model(model)
            adapters.set_adapter("reference")
            with torch.no_grad():
                reference = model(**inputs)
            adapters.set_adapter("policy")
            return loss + 0.1 * (outputs["logits"] - reference["logits"]).pow(2).mean()

    folder = stored(scene)
    model = PeftModel.from_pretrained(scene.load(), folder, is_trainable=True, adapter_name="policy")
    model.load_adapter(folder, adapter_name="reference")
    trainer = scene.trainer(model, Preferences, train_dataset=scene.rows(even=True))
    found = scene.trained(trainer)
    trainer.save_model()
    return {**found, "file": scene.written("policy"), "reference": scene.written("reference")}


def next_task(scene: Scene) -> Found:
    """DDP is wrong too: it knows nothing of parameters that come after it."""
    import torch
    from peft import LoraConfig

    trainer = scene.trainer(scene.model(lora()))
    found = scene.trained(trainer)
    torch.manual_seed(0)
    peft_model(trainer).add_adapter("next", LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    peft_model(trainer).set_adapter("next")
    for name, parameter in peft_model(trainer).named_parameters():
        if ".next." in name:
            # As if each rank had drawn other numbers.
            parameter.data.mul_(1 + scene.rank)
    trainer.optimizer = trainer.lr_scheduler = None
    found["again"] = scene.trained(trainer)
    trainer.save_model()
    return {**found, "file": scene.written("next"), "first": scene.written()}


def again(scene: Scene) -> Found:
    trainer = scene.trainer(scene.model(lora()))
    found = scene.trained(trainer)
    found["again"] = scene.trained(trainer)
    trainer.save_model()
    return {**found, "file": scene.written()}


def loaded_at_the_end(scene: Scene) -> Found:
    folder = stored(scene)
    trainer = scene.trainer(scene.model(lora()), eval_dataset=scene.rows(steps=1))
    found = scene.trained(trainer)
    peft_model(trainer).load_adapter(folder, "best")
    peft_model(trainer).set_adapter("best")
    found["best"] = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    return {**found, "file": scene.written("best")}


def weighted(scene: Scene) -> Found:
    trainer = scene.trainer(scene.model(with_another))
    found = scene.trained(trainer)
    model = peft_model(trainer)
    model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "mix", combination_type="cat")
    model.set_adapter("mix")
    trainer.save_model()
    return {**found, "file": scene.written("mix")}


def deleted(scene: Scene) -> Found:
    trainer = scene.trainer(scene.model(with_another))
    found = scene.trained(trainer)
    peft_model(trainer).delete_adapter("other")
    trainer.save_model()
    return {**found, "file": scene.written()}


def swapped(scene: Scene) -> Found:
    from peft.utils.hotswap import hotswap_adapter

    folder = stored(scene)
    trainer = scene.trainer(scene.model(lora()))
    found = scene.trained(trainer)
    hotswap_adapter(peft_model(trainer), folder, adapter_name="default")
    found["again"] = scene.trained(trainer)
    trainer.save_model()
    return {**found, "file": scene.written()}


CASES = [
    Case(
        "an adapter for each task",
        "https://github.com/huggingface/peft/issues/2639",
        "`compute_loss` calls `set_adapter` with the task of the batch.",
        by_task,
        stock={"FSDP1": cases.EMPTY},
    ),
    Case(
        "policy and reference adapters",
        "https://github.com/huggingface/trl/pull/4723",
        "One saved adapter is loaded twice; the loss switches to the frozen copy and back.",
        with_reference,
        stock={"FSDP1": cases.EMPTY},
    ),
    Case(
        "the next task's adapter",
        "https://github.com/huggingface/peft/issues/837",
        "After `train()` a second adapter is added and made active, and `train()` is called again.",
        next_task,
        (FSDP1, FSDP2, FLAT),
        stock={"FSDP1": "/again/", "FSDP2": "/again/", "FSDP1 flat": "/again/"},
        both=True,
        needs="transformers>=5.0",
    ),
    Case(
        "train() again",
        "https://github.com/huggingface/peft/issues/1280",
        "`train()` is called twice on one Trainer, in units that FSDP1 keeps flat.",
        again,
        (FLAT,),
        stock={"FSDP1 flat": cases.EMPTY},
        needs="transformers>=5.0",
    ),
    Case(
        "an adapter loaded after training",
        "https://github.com/huggingface/trl/issues/2418",
        "A saved adapter is loaded and made active after `train()`, evaluated, and saved.",
        loaded_at_the_end,
        stock={"FSDP1": "/best is"},
        both=True,
    ),
    Case(
        "add_weighted_adapter",
        "https://github.com/huggingface/peft/issues/1571",
        "After training two adapters are combined into a third, which is saved.",
        weighted,
        stock={"FSDP1": "IndexError", "FSDP2": "got mixed torch.Tensor and DTensor"},
    ),
    Case(
        "delete_adapter",
        "https://github.com/huggingface/peft/issues/631",
        "After training one of two adapters is deleted; the other is saved.",
        deleted,
        stock={"FSDP1": "FSDP assumes"},
        always=False,
    ),
    Case(
        "hotswap_adapter",
        "https://github.com/huggingface/trl/issues/3684",
        "After training a saved adapter is swapped in, and training goes on.",
        swapped,
        stock={"FSDP1": "NotImplementedError", "FSDP2": "got mixed torch.Tensor and DTensor"},
        always=False,
        needs="transformers>=5.0",
    ),
]


@pytest.mark.parametrize(("case", "setup"), cases.cells(CASES))
def test_as_in_one_process(ways: cases.Ways, case: Case, setup: cases.Setup) -> None:
    ways.hold(case, setup)
