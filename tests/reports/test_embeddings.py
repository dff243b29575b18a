"""New tokens: vocabularies that are resized before and after peft, with and without modules_to_save."""

from __future__ import annotations

from typing import Any

import cases
import pytest
from cases import Case, Found, Scene


def lora(**settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return lambda model: get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], **settings))


def larger(model: Any) -> Any:
    import torch

    torch.manual_seed(3)
    model.resize_token_embeddings(100, mean_resizing=False)
    return model


def _trained(scene: Scene, model: Any) -> Found:
    trainer = scene.trainer(model)
    found = scene.trained(trainer)
    trainer.save_model()
    return {**found, "file": scene.written()}


def frozen(scene: Scene) -> Found:
    """peft writes resized embeddings into the file, frozen or not."""
    found = _trained(scene, scene.model(lora(), load=lambda: larger(scene.load())))
    assert scene.ranks > 1 or len(found["file"]) == 10
    return found


def trained(scene: Scene) -> Found:
    configure = lora(modules_to_save=["embed_tokens", "lm_head"])
    return _trained(scene, scene.model(configure, load=lambda: larger(scene.load())))


def after_peft(scene: Scene) -> Found:
    return _trained(scene, larger(scene.model(lora())))


CASES = [
    Case(
        "resized vocabulary",
        "https://github.com/huggingface/peft/pull/1147",
        "`resize_token_embeddings`, then LoRA on the attention alone.",
        frozen,
        stock={"FSDP1": cases.EMPTY},
    ),
    Case(
        "new tokens that are trained",
        "https://github.com/hiyouga/LlamaFactory/issues/7665",
        "A resized vocabulary, with `embed_tokens` and `lm_head` in modules_to_save.",
        trained,
        stock={"FSDP1": cases.HUNG},
    ),
    Case(
        "vocabulary resized after peft",
        "https://github.com/huggingface/transformers/issues/40382",
        "`get_peft_model` first, then `resize_token_embeddings`.",
        after_peft,
        stock={"FSDP1": cases.EMPTY},
        always=False,
    ),
]


@pytest.mark.parametrize(("case", "setup"), cases.cells(CASES))
def test_as_in_one_process(ways: cases.Ways, case: Case, setup: cases.Setup) -> None:
    ways.hold(case, setup)
