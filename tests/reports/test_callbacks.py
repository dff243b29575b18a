"""Callbacks that read, replace, freeze, merge or save an adapter during training."""

from __future__ import annotations

from typing import Any

import cases
import pytest
from cases import Case, Found, Scene


def _with(scene: Scene, callback: Any, **keywords: Any) -> tuple[Any, Found]:
    trainer = scene.trainer(callbacks=[callback], **keywords)
    callback.trainer = trainer
    return trainer, scene.trained(trainer)


def _saved(scene: Scene, callback: Any, **keywords: Any) -> Found:
    trainer, found = _with(scene, callback, **keywords)
    trainer.save_model()
    return {**found, "file": scene.written()}


def saves_at_checkpoints(scene: Scene) -> Found:
    from transformers import TrainerCallback

    class SavePeftModelCallback(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            kwargs["model"].save_pretrained(f"{args.output_dir}/checkpoint-{state.global_step}/adapter_model")
            return control

    return {**_with(scene, SavePeftModelCallback())[1], "file": scene.written("checkpoint-2/adapter_model")}


def averages_weights(scene: Scene) -> Found:
    from transformers import TrainerCallback

    class Ema(TrainerCallback):  # type: ignore[misc]
        def trained(self, model: Any) -> list[Any]:
            return [item for item in model.parameters() if item.requires_grad]

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            self.shadow = [item.detach().clone() for item in self.trained(model)]

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            for shadow, item in zip(self.shadow, self.trained(model), strict=True):
                shadow.lerp_(item.detach(), 0.5)

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            for shadow, item in zip(self.shadow, self.trained(model), strict=True):
                item.data.copy_(shadow)

    return _saved(scene, Ema())


def saves_before_the_first_step(scene: Scene) -> Found:
    from transformers import TrainerCallback

    class First(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            model.save_pretrained(scene.folder / "first")

    return {**_saved(scene, First()), "first": scene.written("first")}


def thaws(scene: Scene) -> Found:
    from transformers import TrainerCallback

    class Thaw(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            for name, item in model.named_parameters():
                if "lora_A" in name:
                    item.requires_grad_(state.global_step >= 1)

    return _saved(scene, Thaw())


def reads_gradients(scene: Scene) -> Found:
    from transformers import TrainerCallback

    from trainer_fsdp_patch.names import canonical

    norms: Found = {}

    class Norms(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            for name, item in model.named_parameters():
                if item.grad is not None:
                    norms.setdefault(canonical(name), []).append(float(item.grad.norm()))

    return {**_with(scene, Norms())[1], "norms": norms}


def evaluates(scene: Scene) -> Found:
    from transformers import TrainerCallback

    class Evaluate(TrainerCallback):  # type: ignore[misc]
        trainer: Any

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.trainer.evaluate()

    return _saved(scene, Evaluate(), eval_dataset=scene.rows(steps=1))


def saves_by_a_second_trainer(scene: Scene) -> Found:
    from transformers import Trainer, TrainerCallback

    class Artifact(TrainerCallback):  # type: ignore[misc]
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            Trainer(args=args, model=model).save_model(f"{args.output_dir}/artifact")

    return {**_with(scene, Artifact())[1], "file": scene.written("artifact")}


def merges(scene: Scene) -> Found:
    """As GRPO hands merged weights to vLLM: merge, read each weight in full, take the adapter out again."""
    import torch
    from transformers import TrainerCallback

    batch = {key: value[None] for key, value in scene.rows(even=True)[0].items()}
    seen: list[Any] = []

    class Merge(TrainerCallback):  # type: ignore[misc]
        trainer: Any

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            peft_model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            peft_model.merge_adapter()
            with torch.no_grad():
                seen.append(float(self.trainer.model_wrapped(**batch).loss))
            peft_model.unmerge_adapter()

    trainer, found = _with(scene, Merge())
    trainer.save_model()
    return {**found, "merged": seen, "file": scene.written()}


CASES = [
    Case(
        "SavePeftModelCallback",
        "https://github.com/huggingface/peft/issues/96",
        "`on_save` calls `model.save_pretrained` on every rank, as peft's Whisper example does.",
        saves_at_checkpoints,
        stock={"FSDP1": cases.EMPTY, "FSDP2": "invalid python storage"},
        changes={"save_strategy": "steps", "save_steps": 1},
    ),
    Case(
        "the first save in on_train_begin",
        "https://github.com/huggingface/transformers/pull/30897",
        "A callback calls `model.save_pretrained` before the first step.",
        saves_before_the_first_step,
        stock={"FSDP1": "_is_root", "FSDP2": "invalid python storage"},
    ),
    Case(
        "moving average",
        "https://github.com/huggingface/diffusers/issues/9998",
        "A callback keeps an average of the trainable weights and puts it in their place at the end.",
        averages_weights,
        stock={"FSDP1": cases.EMPTY},
        always=False,
    ),
    Case(
        "freezing for some steps",
        "https://github.com/OptimalScale/LMFlow/issues/726",
        "A callback switches `requires_grad` of some tensors between steps, as LISA does.",
        thaws,
        stock={"FSDP1": cases.EMPTY},
    ),
    Case(
        "gradients in a callback",
        "https://github.com/meta-pytorch/torchforge/issues/592",
        "`on_pre_optimizer_step` logs the norm of each adapter tensor's gradient.",
        reads_gradients,
        stock={"FSDP1": "/norms/", "FSDP2": "/norms/"},
    ),
    Case(
        "evaluate() in a callback",
        "https://github.com/huggingface/transformers/issues/34701",
        "A callback calls `trainer.evaluate()` after each step.",
        evaluates,
        stock={"FSDP1": cases.EMPTY},
        always=False,
    ),
    Case(
        "artifact by a second Trainer",
        "https://github.com/axolotl-ai-cloud/axolotl/issues/2337",
        "`on_train_end` makes another Trainer of the same model and saves with that, as WandbCallback does.",
        saves_by_a_second_trainer,
        stock={"FSDP1": cases.EMPTY},
        always=False,
    ),
    Case(
        "merge_adapter() for a rollout",
        "https://github.com/huggingface/trl/pull/3260",
        "The adapter is merged, the merged weights are used, and it is unmerged, after each step.",
        merges,
        stock={"FSDP1": "/merged/0 is"},
        both=True,
    ),
]


@pytest.mark.parametrize(("case", "setup"), cases.cells(CASES))
def test_as_in_one_process(ways: cases.Ways, case: Case, setup: cases.Setup) -> None:
    ways.hold(case, setup)
