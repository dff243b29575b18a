"""Saves that scripts do themselves, as those of FastChat, llama-recipes, alpaca-lora, LLaMA-Factory and ms-swift."""

from __future__ import annotations

import contextlib
from typing import Any

import cases
import pytest
from cases import Case, Found, Scene


def _fsdp1(scene: Scene) -> bool:
    return scene.ranks > 1 and scene.setup.fsdp == 1


def _full_state_dict(scene: Scene, model: Any) -> Any:
    """FSDP1's context for full state dicts, with the settings of the guides."""
    if not _fsdp1(scene):
        return contextlib.nullcontext()
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType

    config = FullStateDictConfig(offload_to_cpu=True, rank0_only=True)
    return FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, config)


def _whole(scene: Scene, model: Any) -> Found:
    if scene.ranks > 1 and scene.setup.fsdp == 2:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with _full_state_dict(scene, model):
        return dict(model.state_dict())


def peft_model(trainer: Any) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)


def in_a_context(scene: Scene) -> Found:
    trainer = scene.trainer()
    found = scene.trained(trainer)
    with _full_state_dict(scene, trainer.model):
        trainer.save_model()
    return {**found, "file": scene.written()}


def on_the_first_rank(scene: Scene) -> Found:
    trainer = scene.trainer()
    found = scene.trained(trainer)
    state = _whole(scene, trainer.model_wrapped)
    if scene.rank == 0:
        peft_model(trainer).save_pretrained(scene.folder, state_dict=state)
    return {**found, "file": scene.written()}


def replaced_state_dict(scene: Scene) -> Found:
    from peft import get_peft_model_state_dict

    model = scene.model()
    upstream = model.state_dict
    model.state_dict = lambda *args, **kwargs: get_peft_model_state_dict(model, upstream())
    trainer = scene.trainer(model)
    found = scene.trained(trainer)
    model.save_pretrained(scene.folder)
    return {**found, "file": scene.written()}


def on_every_rank(scene: Scene) -> Found:
    trainer = scene.trainer()
    found = scene.trained(trainer)
    peft_model(trainer).save_pretrained(scene.folder)
    return {**found, "file": scene.written()}


def on_the_first_rank_alone(scene: Scene) -> Found:
    trainer = scene.trainer()
    found = scene.trained(trainer)
    if scene.rank == 0:
        peft_model(trainer).save_pretrained(scene.folder)
    return {**found, "file": scene.written()}


def with_embeddings(scene: Scene) -> Found:
    trainer = scene.trainer()
    found = scene.trained(trainer)
    peft_model(trainer).save_pretrained(scene.folder, save_embedding_layers=True)
    return {**found, "file": scene.written()}


def as_a_pickle(scene: Scene) -> Found:
    import torch

    trainer = scene.trainer()
    found = scene.trained(trainer)
    peft_model(trainer).save_pretrained(scene.folder, safe_serialization=False)
    scene.wait()
    file = {} if scene.rank else torch.load(scene.folder / "adapter_model.bin", weights_only=True)
    return {**found, "file": file}


def peft_state_dict(scene: Scene) -> Found:
    import torch
    from peft import get_peft_model_state_dict

    trainer = scene.trainer()
    found = scene.trained(trainer)
    state = get_peft_model_state_dict(peft_model(trainer))
    if scene.rank == 0:
        torch.save(state, scene.folder / "lora.pt")
        found["file"] = torch.load(scene.folder / "lora.pt", weights_only=True)
    return found


def whole_state_dict(scene: Scene) -> Found:
    trainer = scene.trainer()
    found = scene.trained(trainer)
    state = _whole(scene, trainer.model_wrapped)
    return {**found, "state": {} if scene.rank else {key: value.clone() for key, value in state.items()}}


def summoned(scene: Scene) -> Found:
    trainer = scene.trainer()
    found = scene.trained(trainer)
    context: Any = contextlib.nullcontext()
    if _fsdp1(scene):
        from torch.distributed.fsdp import FullyShardedDataParallel

        context = FullyShardedDataParallel.summon_full_params(trainer.model_wrapped, writeback=False)
    with context:
        peft_model(trainer).save_pretrained(scene.folder)
    return {**found, "file": scene.written()}


def own_save_model(scene: Scene) -> Found:
    from transformers import Trainer

    class Own(Trainer):  # type: ignore[misc]
        def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
            folder = output_dir or self.args.output_dir
            state = self.accelerator.get_state_dict(self.model_wrapped)
            if self.args.should_save:
                self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state)

    trainer = scene.trainer(kind=Own)
    found = scene.trained(trainer)
    trainer.save_model()
    return {**found, "file": scene.written(), "checkpoint": scene.written("checkpoint-2")}


def chosen_adapters(scene: Scene) -> Found:
    from peft import LoraConfig

    model = scene.model()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    trainer = scene.trainer(model)
    found = scene.trained(trainer)
    peft_model(trainer).save_pretrained(scene.folder, selected_adapters=["default"])
    return {**found, "file": scene.written(), "other": (scene.folder / "other").exists()}


def converted(scene: Scene) -> Found:
    """PiSSA alters the base, so its adapter is written as a LoRA of twice the rank for the unaltered one."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights="pissa")
    model = scene.model(lambda base: get_peft_model(base, config), nudge=False)
    initial = str(scene.folder / f"initial-{scene.rank}")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(initial)
    model.peft_config["default"].init_lora_weights = "pissa"
    trainer = scene.trainer(model)
    found = scene.trained(trainer)
    peft_model(trainer).save_pretrained(scene.folder, path_initial_model_for_weight_conversion=initial)
    return {**found, "file": scene.written()}


def merged_again(scene: Scene) -> Found:
    """On the first rank alone, while the others wait."""
    from peft import AutoPeftModelForCausalLM

    trainer = scene.trainer()
    found = scene.trained(trainer)
    trainer.save_model()
    scene.wait()
    if scene.rank == 0:
        merged = AutoPeftModelForCausalLM.from_pretrained(scene.folder).merge_and_unload()
        found["merged"] = {key: value.clone() for key, value in merged.state_dict().items()}
    scene.wait()
    return found


def accelerate_state(scene: Scene) -> Found:
    from transformers import TrainerCallback

    class State(TrainerCallback):  # type: ignore[misc]
        trainer: Any

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                self.trainer.accelerator.save_state(f"{args.output_dir}/state")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.trainer.accelerator.load_state(f"{args.output_dir}/state")

    callback = State()
    trainer = scene.trainer(callbacks=[callback])
    callback.trainer = trainer
    found = scene.trained(trainer)
    trainer.save_model()
    return {**found, "file": scene.written()}


def when_logging(scene: Scene) -> Found:
    from transformers import Trainer

    class Logging(Trainer):  # type: ignore[misc]
        def log(self, logs: Any, *args: Any, **kwargs: Any) -> None:
            super().log(logs, *args, **kwargs)
            if "loss" in logs:
                self.save_model(f"{self.args.output_dir}/logged")

    trainer = scene.trainer(kind=Logging)
    return {**scene.trained(trainer), "file": scene.written("logged")}


CASES = [
    Case(
        "trainer_save_model_safe",
        "https://github.com/lm-sys/FastChat/pull/2390",
        "`FSDP.state_dict_type(FULL_STATE_DICT, rank0_only)` around `trainer.save_model()`.",
        in_a_context,
        stock={"FSDP1": cases.EMPTY},
    ),
    Case(
        "full state dict to save_pretrained",
        "https://github.com/meta-llama/llama-cookbook/pull/650",
        "All ranks gather the full state dict; the first writes with `save_pretrained(state_dict=...)`.",
        on_the_first_rank,
        stock={"FSDP1": cases.EMPTY},
        always=False,
    ),
    Case(
        "model.state_dict replaced",
        "https://github.com/huggingface/peft/issues/970",
        "alpaca-lora's script replaces `model.state_dict` by peft's, then saves.",
        replaced_state_dict,
        stock={"FSDP1": cases.EMPTY, "FSDP2": "invalid python storage"},
        always=False,
    ),
    Case(
        "save_pretrained on every rank",
        "https://github.com/huggingface/accelerate/issues/2618",
        "`trainer.model.save_pretrained(folder)` at the end, on all ranks.",
        on_every_rank,
        stock={"FSDP1": cases.EMPTY, "FSDP2": "invalid python storage"},
    ),
    Case(
        "save_pretrained on the first rank alone",
        "https://github.com/huggingface/peft/issues/286",
        "`model.save_pretrained(folder)` where `is_world_process_zero()`.",
        on_the_first_rank_alone,
        stock={"FSDP1": cases.HUNG, "FSDP2": "invalid python storage"},
    ),
    Case(
        "embeddings next to an adapter, by hand",
        "https://github.com/huggingface/peft/pull/1147",
        "`model.save_pretrained(save_embedding_layers=True)` without a state dict.",
        with_embeddings,
        stock={"FSDP1": cases.EMPTY, "FSDP2": "invalid python storage"},
        both=True,
    ),
    Case(
        "safe_serialization=False",
        "https://github.com/huggingface/accelerate/issues/2618",
        "The same, with a pickle for a file.",
        as_a_pickle,
        stock={"FSDP1": cases.EMPTY, "FSDP2": "is a DTensor"},
        always=False,
    ),
    Case(
        "get_peft_model_state_dict and torch.save",
        "https://github.com/verl-project/verl/pull/7057",
        "`torch.save(get_peft_model_state_dict(model))` without a state dict.",
        peft_state_dict,
        stock={"FSDP1": cases.EMPTY, "FSDP2": "is a DTensor"},
        always=False,
    ),
    Case(
        "the full state dict",
        "https://github.com/huggingface/accelerate/issues/2603",
        "The full state dict of the wrapped model is gathered, base and adapter.",
        whole_state_dict,
    ),
    Case(
        "saved inside summon_full_params",
        "https://github.com/huggingface/trl/pull/3735",
        "`summon_full_params` around `save_pretrained` on all ranks.",
        summoned,
        stock={"FSDP1": cases.EMPTY, "FSDP2": "invalid python storage"},
        always=False,
    ),
    Case(
        "own save_model()",
        "https://github.com/axolotl-ai-cloud/axolotl/pull/329",
        "A Trainer's `save_model` gathers by `accelerator.get_state_dict` and writes on the first rank.",
        own_save_model,
        stock={"FSDP1": cases.EMPTY},
        changes={"save_strategy": "steps", "save_steps": 2},
        always=False,
    ),
    Case(
        "selected_adapters",
        "https://github.com/modelscope/ms-swift/issues/8336",
        "`save_pretrained(selected_adapters=[...])` on all ranks.",
        chosen_adapters,
        stock={"FSDP1": cases.EMPTY, "FSDP2": "invalid python storage"},
        always=False,
    ),
    Case(
        "PiSSA written as LoRA",
        "https://github.com/hiyouga/LlamaFactory/issues/5122",
        "`save_pretrained(path_initial_model_for_weight_conversion=...)` on all ranks.",
        converted,
        stock={"FSDP1": cases.EMPTY, "FSDP2": "invalid python storage"},
        always=False,
    ),
    Case(
        "loaded and merged by the same script",
        "https://github.com/axolotl-ai-cloud/axolotl/pull/1479",
        "After `save_model()` the first rank loads the adapter again, merges and keeps the model.",
        merged_again,
        stock={"FSDP1": "/merged/"},
        always=False,
    ),
    Case(
        "accelerator.save_state and load_state",
        "https://github.com/huggingface/transformers/issues/30491",
        "A callback saves the state after the first step and goes back to it at the end.",
        accelerate_state,
        stock={"FSDP1": cases.EMPTY},
        always=False,
    ),
    Case(
        "saved when logging",
        "https://github.com/huggingface/peft/issues/96",
        "A Trainer's `log` calls `save_model`.",
        when_logging,
        stock={"FSDP1": cases.EMPTY},
        always=False,
    ),
]


@pytest.mark.parametrize(("case", "setup"), cases.cells(CASES))
def test_as_in_one_process(ways: cases.Ways, case: Case, setup: cases.Setup) -> None:
    ways.hold(case, setup)
