"""What stands beside an adapter: norms in fp32, a teacher that is sharded too, an adapter that was saved before."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import pytest
from cases import FSDP1, FSDP2, Case, Found, Scene

MIXED = tuple(
    dataclasses.replace(item, name=f"{item.name} bf16", dtype="bfloat16", amp="bf16") for item in (FSDP1, FSDP2)
)
PACKED = tuple(dataclasses.replace(item, name=f"{item.name} 4-bit", storage="bfloat16") for item in MIXED)


def _saved(scene: Scene, trainer: Any) -> Found:
    found = scene.trained(trainer)
    trainer.save_model()
    return {**found, "file": scene.written()}


def norms_in_fp32(scene: Scene) -> Found:
    def load() -> Any:
        model = scene.load()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data = parameter.data.float()
        return model

    return _saved(scene, scene.trainer(scene.model(load=load)))


def prepared_for_kbit(scene: Scene) -> Found:
    from peft import prepare_model_for_kbit_training

    def load() -> Any:
        return prepare_model_for_kbit_training(
            scene.load(), gradient_checkpointing_kwargs={"use_reentrant": False}, use_gradient_checkpointing=True
        )

    return _saved(scene, scene.trainer(scene.model(load=load)))


def taught(scene: Scene, teacher: Any) -> Found:
    import torch
    from transformers import Trainer

    class Distillation(Trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.is_fsdp_enabled:
                from trl.models.utils import prepare_fsdp

                self.teacher = prepare_fsdp(teacher, self.accelerator)
            else:
                self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, True)
            with torch.no_grad():
                wanted = self.teacher(**inputs)
            return loss + 0.1 * (outputs["logits"] - wanted["logits"]).pow(2).mean()

    return _saved(scene, scene.trainer(kind=Distillation, train_dataset=scene.rows(even=True)))


def teacher(scene: Scene) -> Found:
    return taught(scene, scene.load().eval())


def teacher_with_adapter(scene: Scene) -> Found:
    return taught(scene, scene.model().eval().requires_grad_(False))


def continued(scene: Scene) -> Found:
    from peft import PeftModel

    folder = scene.folder / f"adapter-{scene.rank}"
    scene.model().save_pretrained(folder)
    model = PeftModel.from_pretrained(
        scene.load(), folder, is_trainable=True, low_cpu_mem_usage=True, autocast_adapter_dtype=False
    )
    return _saved(scene, scene.trainer(model))


CASES = [
    Case(
        "norms in fp32",
        "https://github.com/hiyouga/LlamaFactory/pull/10346",
        "The norms of a bf16 base are in fp32, as upcast_layernorm makes them.",
        norms_in_fp32,
        MIXED,
        {"FSDP1 bf16": "uniform dtype"},
        always=False,
    ),
    Case(
        "prepare_model_for_kbit_training",
        "https://github.com/huggingface/trl/pull/4457",
        "It casts norms, embeddings and head of a 4-bit base to fp32.",
        prepared_for_kbit,
        PACKED,
        {"FSDP1 bf16 4-bit": "uniform dtype"},
    ),
    Case(
        "a teacher next to it",
        "https://github.com/huggingface/trl/pull/6573",
        "A frozen teacher is sharded by TRL's `prepare_fsdp`, and the loss compares logits.",
        teacher,
        stock={"FSDP1": cases.EMPTY},
        missing=("trl",),
    ),
    Case(
        "a teacher with an adapter",
        "https://github.com/ModelTC/LightX2V/pull/1122",
        "The same, where the teacher has a frozen adapter of its own.",
        teacher_with_adapter,
        stock={"FSDP1": cases.EMPTY},
        missing=("trl",),
        always=False,
    ),
    Case(
        "a saved adapter trained on",
        "https://github.com/hiyouga/LlamaFactory/issues/5848",
        "`PeftModel.from_pretrained(is_trainable=True, low_cpu_mem_usage=True)`.",
        continued,
        stock={"FSDP1": cases.EMPTY},
        always=False,
    ),
]


@pytest.mark.parametrize(("case", "setup"), cases.cells(CASES))
def test_as_in_one_process(ways: cases.Ways, case: Case, setup: cases.Setup) -> None:
    ways.hold(case, setup)
