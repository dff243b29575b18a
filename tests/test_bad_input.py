"""Each bad input gets one clear error on every rank before an optimizer step, and nothing is half applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cells import METHODS, Bench, Setup, trial

from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome


def spoiled(spoil: Any, setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """Train one case as `trial.train` does, with `spoil(stage, thing, rank)` called where it can do harm."""

    import torch
    from transformers import Trainer

    import trainer_fsdp_patch

    given = trial.enter(setup, folder, 2, patched=True)
    torch.manual_seed(0)
    model = trial.load_base(base, setup)
    model = spoil("model", model, rank) or METHODS["vera"](model)
    trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(trial.STEPS * trial.BATCH))
    spoil("trainer", trainer, rank)
    outcome = Outcome()
    try:
        trainer.train()
        outcome.extra["after"] = spoil("trained", trainer, rank)
    except trainer_fsdp_patch.errors.TrainerFsdpPatchError as error:
        outcome.extra["error"] = f"{type(error).__name__}: {error}"
    outcome.extra["steps"] = trainer.state.global_step
    return outcome


def errors(bench: Bench, spoil: Any, folder: Path, setup: Setup) -> list[str]:
    """Messages of both ranks; no step was made."""
    outcomes = forks.launch(spoiled, spoil, setup, bench.base, str(folder), ranks=2)
    for outcome in outcomes:
        assert not outcome.error, outcome.extra.get("traceback", outcome.error)
        assert outcome.extra["steps"] == 0
    return [outcome.extra.get("error", "") for outcome in outcomes]


@pytest.mark.parametrize("fsdp", [1, 2])
def test_a_model_already_wrapped_by_fsdp(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    def spoil(stage: str, thing: Any, rank: int) -> Any:
        if stage != "model":
            return None
        import torch
        from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

        model = METHODS["vera"](thing)
        if fsdp == 1:
            return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        return fully_shard(model)

    for text in errors(bench, spoil, tmp_path, Setup("wrapped", fsdp=fsdp)):
        assert text.startswith("PlanError: ")
        assert f"already wrapped by FSDP{fsdp}" in text


IGNORED = {
    "is no module of the model": lambda model: [type(model)(model.config)],
    "is no regular expression": lambda model: "(",
    "matches the full name of no module": lambda model: "nothing_like_this",
    "is a str and no module": lambda model: ["lm_head"],
    "no parameter of the model is left to shard": lambda model: ".*",
}


@pytest.mark.parametrize("expected", IGNORED)
@pytest.mark.parametrize("fsdp", [1, 2])
def test_ignored_modules_that_contradict(bench: Bench, tmp_path: Path, fsdp: int, expected: str) -> None:
    def spoil(stage: str, thing: Any, rank: int) -> Any:
        if stage == "trainer":
            plugin = thing.accelerator.state.fsdp_plugin
            plugin.ignored_modules = IGNORED[expected](thing.model.get_base_model())
        return None

    for text in errors(bench, spoil, tmp_path, Setup("ignored", fsdp=fsdp)):
        assert text.startswith("PlanError: ignored_modules: ")
        assert expected in text


def test_a_users_ignored_modules_win(bench: Bench, tmp_path: Path) -> None:
    def spoil(stage: str, thing: Any, rank: int) -> Any:
        if stage == "trainer":
            thing.accelerator.state.fsdp_plugin.ignored_modules = ".*mlp"
        if stage == "trained":
            from torch.distributed.tensor import DTensor

            return {name: isinstance(item, DTensor) for name, item in thing.model.named_parameters()}
        return None

    for outcome in forks.launch(spoiled, spoil, Setup("users"), bench.base, str(tmp_path), ranks=2):
        assert not outcome.error, outcome.extra
        sharded = outcome.extra["after"]
        assert not any(value for name, value in sharded.items() if ".mlp." in name or "vera" in name)
        assert all(value for name, value in sharded.items() if ".mlp." not in name and "vera" not in name)


@pytest.mark.parametrize(("dtype", "setting"), [("param_dtype", "param_dtype"), ("buffer_dtype", "buffer_dtype")])
def test_a_mixed_precision_policy_that_would_change_frozen_bits(
    bench: Bench, tmp_path: Path, dtype: str, setting: str
) -> None:
    def spoil(stage: str, thing: Any, rank: int) -> Any:
        if stage == "trainer":
            import torch
            from torch.distributed.fsdp import MixedPrecision

            thing.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecision(**{dtype: torch.bfloat16})
        return None

    storage = "float32" if dtype == "param_dtype" else ""
    for text in errors(bench, spoil, tmp_path, Setup("policy", fsdp=1, storage=storage)):
        assert text.startswith(f"PlanError: mixed_precision_policy.{setting}: ")


def test_use_orig_params_false_under_fsdp2_is_warned_of() -> None:
    """When a plan is made, and not for plugins of other runs."""
    import trainer_fsdp_patch

    trainer_fsdp_patch.patch()
    from accelerate import FullyShardedDataParallelPlugin

    from trainer_fsdp_patch.errors import TrainerFsdpPatchWarning
    from trainer_fsdp_patch.preparing import fsdp_plugin

    made = FullyShardedDataParallelPlugin(fsdp_version=2, use_orig_params=False)
    with pytest.warns(TrainerFsdpPatchWarning, match="use_orig_params: False is asked for with FSDP2"):
        fsdp_plugin.warn_of_flag(made, {})


@pytest.mark.parametrize("fsdp", [1, 2])
def test_an_adapter_attached_after_preparation(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    """An optimizer that steps it would step another one on each rank; where none does, one process trains on too."""

    def spoil(stage: str, thing: Any, rank: int) -> Any:
        if stage != "trainer":
            return None
        import torch
        from transformers import TrainerCallback

        class Late(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
                layer = next(module for module in model.modules() if hasattr(module, "vera_lambda_b"))
                layer.vera_lambda_b["late"] = torch.nn.Parameter(torch.ones(64))
                kwargs["optimizer"].add_param_group({"params": [layer.vera_lambda_b["late"]]})

        thing.add_callback(Late())
        return None

    for text in errors(bench, spoil, tmp_path, Setup("late", fsdp=fsdp)):
        assert text.startswith("AdapterError: ")
        assert "vera_lambda_b.late: became trainable after the model was prepared" in text


@pytest.mark.parametrize("fsdp", [1, 2])
def test_an_adapter_that_one_rank_alone_adds_later(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    def spoil(stage: str, thing: Any, rank: int) -> Any:
        if stage == "model":
            return METHODS["lora"](thing)
        if stage == "trained":
            from peft import LoraConfig

            from trainer_fsdp_patch.names import unwrap

            if rank == 0:
                unwrap(thing.model).add_adapter("late", LoraConfig(r=4, target_modules=["q_proj"]))
            thing.train()
        return None

    for outcome in forks.launch(spoiled, spoil, Setup("late", fsdp=fsdp), bench.base, str(tmp_path), ranks=2):
        assert not outcome.error, outcome.extra.get("traceback", outcome.error)
        assert outcome.extra["error"].startswith("AdapterError: ")
        assert "not alike on rank 0 and rank 1" in outcome.extra["error"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"r": 4}, "peft_config['default'].r: 8 on rank 0 and 4 on rank 1"),
        ({"vera_dropout": 0.5}, "peft_config['default'].vera_dropout: 0.0 on rank 0 and 0.5 on rank 1"),
    ],
)
def test_a_rank_whose_adapter_configuration_differs(
    bench: Bench, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    def spoil(stage: str, thing: Any, rank: int) -> Any:
        if stage != "model":
            return None
        from peft import VeraConfig, get_peft_model

        settings = {"r": 8, "target_modules": ["q_proj"], "projection_prng_key": 1} | (change if rank else {})
        return get_peft_model(thing, VeraConfig(**settings))

    for text in errors(bench, spoil, tmp_path, Setup("ranks", fsdp=2)):
        assert text.startswith("AdapterError: ")
        assert expected in text


def spoil_tensor(value: float, ranks: tuple[int, ...]) -> Any:
    """Save once, spoil one value of the adapter on some ranks, save again; returns error and both files."""

    def spoil(stage: str, thing: Any, rank: int) -> Any:
        if stage != "trained":
            return None
        from trainer_fsdp_patch.errors import AdapterError

        file = Path(thing.args.output_dir) / "adapter_model.safetensors"
        thing.save_model()
        thing.accelerator.wait_for_everyone()
        before = file.read_bytes()
        for name, parameter in thing.model.named_parameters():
            if "vera_lambda_d" in name and rank in ranks:
                parameter.data[0] = value
        try:
            thing.save_model()
        except AdapterError as error:
            return {"text": str(error), "kept": file.read_bytes() == before}
        return {"text": "", "kept": file.read_bytes() == before}

    return spoil


@pytest.mark.parametrize("fsdp", [1, 2])
@pytest.mark.parametrize(
    ("value", "ranks", "expected"),
    [
        (float("nan"), (0, 1), "1 of 8 values are not finite"),
        (7.0, (1,), "its bits differ between ranks before saving"),
    ],
)
def test_an_adapter_that_must_not_be_saved(
    bench: Bench, tmp_path: Path, fsdp: int, value: float, ranks: tuple[int, ...], expected: str
) -> None:
    setup = Setup("dead", fsdp=fsdp)
    for outcome in forks.launch(spoiled, spoil_tensor(value, ranks), setup, bench.base, str(tmp_path), ranks=2):
        assert not outcome.error, outcome.extra.get("traceback", outcome.error)
        assert expected in outcome.extra["after"]["text"]
        assert "vera_lambda_d" in outcome.extra["after"]["text"]
        assert outcome.extra["after"]["kept"]


def test_use_orig_params_false_in_fsdp_config_is_warned_of(bench: Bench, tmp_path: Path) -> None:
    def spoil(stage: str, thing: Any, rank: int) -> Any:
        if stage == "trainer":
            import warnings

            from trainer_fsdp_patch.errors import TrainerFsdpPatchWarning

            thing.args.fsdp_config["use_orig_params"] = "false"
            warnings.simplefilter("error", category=TrainerFsdpPatchWarning)
        return None

    for outcome in forks.launch(spoiled, spoil, Setup("orig"), bench.base, str(tmp_path), ranks=2):
        assert "use_orig_params: False is asked for with FSDP2" in outcome.error


def test_a_trainable_base_weight_is_warned_of(bench: Bench, tmp_path: Path) -> None:
    def spoil(stage: str, thing: Any, rank: int) -> Any:
        import warnings

        if stage == "model":
            model = METHODS["vera"](thing)
            model.get_base_model().model.norm.weight.requires_grad_(True)
            return model
        if stage == "trainer":
            warnings.simplefilter("error", category=__import__("trainer_fsdp_patch").errors.TrainerFsdpPatchWarning)
        return None

    for outcome in forks.launch(spoiled, spoil, Setup("unfrozen"), bench.base, str(tmp_path), ranks=2):
        assert "model.norm.weight: trainable, but part of no adapter" in outcome.error
