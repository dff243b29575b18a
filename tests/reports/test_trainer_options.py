"""Arguments of the Trainer beside an adapter: losses, batches, checkpointing, evaluation, schedules."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import pytest
from cases import FSDP1, FSDP2, Case, Found, Scene

ACCUMULATED = tuple(dataclasses.replace(item, name=f"{item.name} x2", accumulation=2) for item in (FSDP1, FSDP2))


def _saved(scene: Scene, trainer: Any) -> Found:
    found = scene.trained(trainer)
    trainer.save_model()
    return {**found, "file": scene.written()}


def plain(scene: Scene) -> Found:
    return _saved(scene, scene.trainer(eval_dataset=scene.rows(steps=1)))


def even(scene: Scene) -> Found:
    return _saved(scene, scene.trainer(train_dataset=scene.rows(even=True)))


def own_sum(scene: Scene) -> Found:
    import torch

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    return _saved(scene, scene.trainer(compute_loss_func=loss))


def metrics(scene: Scene) -> Found:
    import numpy

    def compute(prediction: Any) -> Found:
        logits, inputs = prediction.predictions, prediction.inputs
        return {"rows": len(logits), "inputs": int(numpy.sum(inputs)), "mean": float(numpy.abs(logits).mean())}

    trainer = scene.trainer(eval_dataset=scene.rows()[:7], compute_metrics=compute)
    trainer.label_names = ["labels"]
    trainer.train()
    seen = {key: value for key, value in trainer.evaluate().items() if "per_second" not in key and "time" not in key}
    predicted = trainer.predict(trainer.eval_dataset)
    return {
        **{key: seen[key] for key in ("eval_loss", "eval_rows", "eval_inputs", "eval_mean")},
        "predicted": float(abs(predicted.predictions).mean()),
        "test": predicted.metrics["test_loss"],
    }


def reentrant_by_hand(scene: Scene) -> Found:
    model = scene.model()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return _saved(scene, scene.trainer(model))


def synchronised(scene: Scene) -> Found:
    scene.given.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True}
    return plain(scene)


def streamed(scene: Scene) -> Found:
    import torch

    class Stream(torch.utils.data.IterableDataset):  # type: ignore[misc]
        def __iter__(self) -> Any:
            return iter(scene.rows())

    return _saved(scene, scene.trainer(train_dataset=Stream()))


def made_anew(scene: Scene) -> Found:
    from transformers import PrinterCallback, Trainer

    trainer = Trainer(model_init=lambda: scene.model(), args=scene.given, train_dataset=scene.rows())
    trainer.remove_callback(PrinterCallback)
    found = scene.trained(trainer)
    trainer.save_model()
    return {**found, "file": scene.written()}


def stopped_early(scene: Scene) -> Found:
    from transformers import EarlyStoppingCallback

    trainer = scene.trainer(eval_dataset=scene.rows(steps=1), callbacks=[EarlyStoppingCallback(1)])
    found = _saved(scene, trainer)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    return {**found, "rates": rates, "left": sorted(path.name for path in scene.folder.glob("checkpoint*"))}


def plateau() -> Found:
    from transformers import SchedulerType
    from transformers.trainer_utils import IntervalStrategy

    return {
        "lr_scheduler_type": SchedulerType("reduce_lr_on_plateau"),
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": IntervalStrategy("steps"),
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "save_total_limit": 1,
    }


REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}

CASES = [
    Case(
        "label smoothing",
        "https://github.com/huggingface/transformers/issues/46731",
        "label_smoothing_factor=0.1, with gradient accumulation.",
        even,
        ACCUMULATED,
        {"FSDP1 x2": cases.EMPTY},
        {"label_smoothing_factor": 0.1},
        always=False,
    ),
    Case(
        "compute_loss_func over all tokens",
        "https://github.com/huggingface/transformers/pull/34198",
        "A loss of one's own, a sum that is divided by num_items_in_batch.",
        own_sum,
        (*ACCUMULATED, FSDP1),
        {"FSDP1 x2": cases.EMPTY, "FSDP1": cases.EMPTY},
        always=False,
    ),
    Case(
        "average_tokens_across_devices=False",
        "https://github.com/hiyouga/LlamaFactory/pull/10454",
        "Each rank divides by its own tokens; all have as many.",
        even,
        (FSDP1, FSDP2),
        {"FSDP1": cases.EMPTY},
        {"average_tokens_across_devices": False},
        always=False,
    ),
    Case(
        "reentrant gradient checkpointing",
        "https://github.com/huggingface/peft/issues/1142",
        'gradient_checkpointing with {"use_reentrant": True}, accumulated.',
        plain,
        ACCUMULATED,
        {"FSDP1 x2": cases.EMPTY},
        REENTRANT,
    ),
    Case(
        "reentrant checkpointing by hand",
        "https://github.com/huggingface/transformers/issues/26334",
        "`enable_input_require_grads()` and `gradient_checkpointing_enable()` on the PeftModel.",
        reentrant_by_hand,
        (FSDP1, FSDP2),
        {"FSDP1": cases.EMPTY},
        always=False,
    ),
    Case(
        "sync_each_batch",
        "https://github.com/allenai/open-instruct/pull/746",
        "Gradients are synchronised after each batch of an accumulation.",
        synchronised,
        ACCUMULATED,
        {"FSDP1 x2": cases.EMPTY},
    ),
    Case(
        "NEFTune",
        "https://github.com/huggingface/trl/issues/923",
        "neftune_noise_alpha, so small here that no noise shows.",
        plain,
        (FSDP1, FSDP2),
        {"FSDP1": cases.EMPTY},
        {"neftune_noise_alpha": 1e-7},
        always=False,
    ),
    Case(
        "metrics over inputs",
        "https://github.com/huggingface/transformers/issues/24734",
        "include_for_metrics and eval_accumulation_steps over 7 rows; predict().",
        metrics,
        (FSDP1, FSDP2),
        {},
        {"include_for_metrics": ["inputs"], "eval_accumulation_steps": 1},
        always=False,
    ),
    Case(
        "eval_on_start",
        "https://github.com/axolotl-ai-cloud/axolotl/pull/2797",
        "An evaluation inside `train()` before the first step.",
        plain,
        (FSDP1, FSDP2),
        {"FSDP1": cases.EMPTY},
        {"eval_on_start": True},
        always=False,
    ),
    Case(
        "streamed data",
        "https://github.com/huggingface/trl/pull/1468",
        "An IterableDataset, which the first rank reads for all.",
        streamed,
        (FSDP1, FSDP2),
        {"FSDP1": cases.EMPTY},
        always=False,
    ),
    Case(
        "model_init",
        "https://github.com/huggingface/peft/issues/914",
        "`Trainer(model_init=...)` makes the PeftModel in `train()`.",
        made_anew,
        (FSDP1, FSDP2),
        {"FSDP1": cases.EMPTY},
        always=False,
    ),
    Case(
        "max_grad_norm=0",
        "https://github.com/axolotl-ai-cloud/axolotl/issues/3058",
        "No clipping.",
        plain,
        (FSDP1, FSDP2),
        {"FSDP1": cases.EMPTY},
        {"max_grad_norm": 0.0},
        always=False,
    ),
    Case(
        "plateau, early stopping, one checkpoint left",
        "https://github.com/huggingface/notebooks/issues/472",
        "reduce_lr_on_plateau, EarlyStoppingCallback, load_best_model_at_end, save_total_limit=1.",
        stopped_early,
        (FSDP1, FSDP2),
        {"FSDP1": cases.EMPTY},
        plateau(),
        always=False,
    ),
]


@pytest.mark.parametrize(("case", "setup"), cases.cells(CASES))
def test_as_in_one_process(ways: cases.Ways, case: Case, setup: cases.Setup) -> None:
    ways.hold(case, setup)
