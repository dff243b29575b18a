"""`inject_adapter_in_model`, peft's way without a PeftModel: the base keeps its class and has layers of an adapter."""

from __future__ import annotations

from typing import Any

import cases
import pytest
from cases import FSDP1, FSDP2, Case, Found, Scene


def injected(model: Any) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "o_proj"]), model)


def _adapter(scene: Scene, trainer: Any) -> Found:
    """As peft's guide has it: by hand, from the model's state dict."""
    from peft import get_peft_model_state_dict

    whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {} if scene.rank else {k: v.clone() for k, v in get_peft_model_state_dict(model, state_dict=whole).items()}


def saved_whole(scene: Scene) -> Found:
    """A Trainer writes such a model tensor by tensor."""
    from safetensors.torch import load_file

    trainer = scene.trainer(scene.model(injected))
    found = scene.trained(trainer)
    trainer.save_model()
    scene.wait()
    return {**found, "file": {} if scene.rank else load_file(scene.folder / "model.safetensors")}


def by_hand(scene: Scene) -> Found:
    trainer = scene.trainer(scene.model(injected))
    found = scene.trained(trainer)
    return {**found, "adapter": _adapter(scene, trainer)}


def resumed(scene: Scene) -> Found:
    trainer = scene.trainer(scene.model(injected))
    found = scene.trained(trainer, resume_from_checkpoint=str(scene.before / "checkpoint-2"))
    return {**found, "step": trainer.state.global_step, "adapter": _adapter(scene, trainer)}


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2}
BEFORE = Case("", "", "", by_hand, changes=CHECKPOINTS)

CASES = [
    Case(
        "save_model() of an injected adapter",
        "https://github.com/huggingface/peft/issues/3012",
        "`inject_adapter_in_model`, `train()`, `save_model()`: the file has base and adapter.",
        saved_whole,
        both=True,
    ),
    Case(
        "an injected adapter by hand",
        "https://github.com/huggingface/diffusers/pull/6119",
        "`get_peft_model_state_dict` of the gathered state dict, as diffusers' scripts do.",
        by_hand,
        stock={"FSDP1": "/adapter: 8 of 8 keys missing"},
        always=False,
    ),
    *(
        Case(
            f"an injected adapter resumed ({setup.name})",
            "https://github.com/huggingface/peft/issues/3012",
            "`resume_from_checkpoint` of such a run.",
            resumed,
            (setup,),
            {"FSDP1": "/adapter: 8 of 8 keys missing"},
            first=(BEFORE, setup),
        )
        for setup in (FSDP1, FSDP2)
    ),
]


@pytest.mark.parametrize(("case", "setup"), cases.cells(CASES))
def test_as_in_one_process(ways: cases.Ways, case: Case, setup: cases.Setup) -> None:
    ways.hold(case, setup)
