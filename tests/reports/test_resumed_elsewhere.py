"""Checkpoints of the other FSDP, with two adapters, and as the start of a new run."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import pytest
from cases import FSDP1, FSDP2, Case, Found, Scene
from faults import FLAVOURS


def with_another(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    return model


def trained(scene: Scene) -> Found:
    return scene.trained(scene.trainer())


def two_trained(scene: Scene) -> Found:
    return scene.trained(scene.trainer(scene.model(with_another)))


def _resumed(scene: Scene, model: Any) -> Found:
    trainer = scene.trainer(model)
    found = scene.trained(trainer, resume_from_checkpoint=str(scene.before / "checkpoint-2"))
    trainer.save_model()
    return {**found, "step": trainer.state.global_step, "file": scene.written()}


def resumed(scene: Scene) -> Found:
    return _resumed(scene, scene.model())


def two_resumed(scene: Scene) -> Found:
    return {**_resumed(scene, scene.model(with_another)), "other": scene.written("other")}


def from_a_checkpoint(scene: Scene) -> Found:
    from peft import PeftModel

    model = PeftModel.from_pretrained(scene.load(), scene.before / "checkpoint-2", is_trainable=True)
    trainer = scene.trainer(model)
    found = scene.trained(trainer)
    trainer.save_model()
    return {**found, "file": scene.written()}


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2}
ONE, TWO = (Case("", "", "", action, changes=CHECKPOINTS) for action in (trained, two_trained))

CASES = [
    Case(
        "FSDP1's checkpoint under FSDP2",
        "https://github.com/huggingface/transformers/pull/45640",
        "transformers 5.10 made FSDP2 the default; a run that began before is resumed.",
        resumed,
        (FSDP2,),
        {"FSDP2": "/grad_norm/"},
        first=(ONE, FSDP1),
    ),
    Case(
        "FSDP2's checkpoint under FSDP1",
        "https://github.com/huggingface/transformers/pull/45640",
        "The other way round.",
        resumed,
        (FSDP1,),
        {"FSDP1": "/grad_norm/"},
        first=(ONE, FSDP2),
        always=False,
    ),
    *(
        Case(
            f"two adapters resumed ({setup.name})",
            "https://github.com/huggingface/peft/issues/2834",
            "`resume_from_checkpoint` of a model with an inactive second adapter.",
            two_resumed,
            (setup,),
            {"FSDP1": "/grad_norm/"},
            # Before, one process resumes the second adapter alone, and goes on with a fresh first one.
            needs="transformers>=5.24.dev0",
            first=(TWO, setup),
        )
        for setup in (FSDP1, FSDP2)
    ),
    *(
        Case(
            f"a checkpoint's adapter trained on ({setup.name})",
            "https://github.com/axolotl-ai-cloud/axolotl/pull/400",
            "`PeftModel.from_pretrained(checkpoint, is_trainable=True)` in a new run.",
            from_a_checkpoint,
            (setup,),
            {"FSDP1": "/loss/0 is"},
            always=False,
            first=(ONE, setup),
        )
        for setup in (FSDP1, FSDP2)
    ),
]


@pytest.mark.parametrize(("case", "setup"), cases.cells(CASES))
def test_as_in_one_process(ways: cases.Ways, case: Case, setup: cases.Setup) -> None:
    ways.hold(case, setup)


@pytest.mark.parametrize("fsdp", FLAVOURS)
def test_two_adapters_resume_on_every_release(ways: cases.Ways, fsdp: int) -> None:
    """As training that nothing interrupts, also where one process goes on with a fresh first adapter."""
    setup = {1: FSDP1, 2: FSDP2}[fsdp]
    straight = ways.one(dataclasses.replace(TWO, name="two adapters, straight"), setup)
    case = next(item for item in CASES if item.action is two_resumed and item.setups == (setup,))
    outcomes = cases.run(case, setup, ways.bench.base, ways.bench.folder / f"two {fsdp}", patched=True)
    for outcome in outcomes:
        assert not outcome.error, outcome.extra.get("traceback", outcome.error)
        assert outcome.extra["found"]["loss"] == pytest.approx(straight.extra["found"]["loss"], rel=1e-3)
        assert outcome.extra["found"]["grad_norm"] == pytest.approx(straight.extra["found"]["grad_norm"], rel=1e-3)
