"""Runs without FSDP, or without an adapter, in all their kinds; `walk` runs them stock and patched."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from torch.distributed.fsdp import FullyShardedDataParallel
from walk import STEPS, arguments, attempt, base_model, documented, heard, plain, trained, trainer_of, whole

from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.planning import prepared
from trainer_fsdp_patch.planning.plan import make_plan
from trainer_fsdp_patch.testing import cpu, releases, trial
from trainer_fsdp_patch.testing.case import Setup

WITHOUT_BEST = {"load_best_model_at_end": False, "metric_for_best_model": None}
Run = Callable[[str], dict[str, Any]]


def alone(method: str = "", *, evaluate: bool = True, model: Any = None, **changes: Any) -> Run:
    """One process, or DDP where there are ranks.

    Args:
        method: of the matrix, or "" for full fine-tuning.
        evaluate: whether to do so before training.
        model: changes to the set-up that the base is loaded by.
        **changes: to the TrainingArguments.
    """

    def run(base: str) -> dict[str, Any]:
        make = base_model(base, method, **(model or {}))
        if not method:
            return whole(lambda: arguments(**changes), make, evaluate=evaluate)
        import peft
        from cells import METHODS

        saw = whole(lambda: arguments(**changes), make, evaluate=evaluate, callbacks=METHODS[method].callbacks())
        adapted = make()
        saw["peft's function"] = attempt(lambda: peft.get_peft_model_state_dict(adapted))
        saw["with a state dict"] = attempt(
            lambda: peft.get_peft_model_state_dict(adapted, adapted.state_dict(), adapter_name="default")
        )
        return saw

    return run


def planned(base: str) -> Any:
    """A model that a plan was applied to, in a process that trains something else; it is planned while it is held."""
    model = base_model(base, "lora")()
    prepared.keep(model, prepared.Prepared(model, make_plan(model), [None], inventory.take(model)))
    return model


def beside(run: Run) -> Run:
    """The same in a process that has a planned model too, as after a run under FSDP."""

    def both(base: str) -> dict[str, Any]:
        other = planned(base)
        saw = run(base)
        assert prepared.prepared_for(other) is not None
        return saw

    return both


def ddp(method: str = "") -> Run:
    def run(base: str) -> dict[str, Any]:
        saw = alone(method, evaluate=False)(base)
        assert saw["model"] == "DistributedDataParallel"
        return saw

    return run


def deepspeed(stage: int, method: str = "lora") -> Run:
    """DeepSpeed on CPU ranks, from which accelerate keeps it."""

    def run(base: str) -> dict[str, Any]:
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        os.environ["DS_ACCELERATOR"] = "cpu"
        config = {
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": stage == 3},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
        }

        def start() -> Any:
            given = arguments(deepspeed=config)
            assert given.device.type == "cpu"
            PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
            os.environ.pop("ACCELERATE_USE_CPU", None)
            return given

        saw = whole(start, base_model(base, method))
        assert saw["model"] == "DeepSpeedEngine"
        return saw

    return run


def fsdp(version: int, *, beside: bool = True, **changes: Any) -> Run:
    """FSDP of a model without an adapter, with dropout.

    Args:
        version: of FSDP.
        beside: whether a second model has an adapter, which is never prepared.
        **changes: to the set-up.
    """
    setup = Setup("walk", fsdp=version, **changes)
    # The name of the best checkpoint depends on which rank makes its folder.
    best = WITHOUT_BEST if setup.sharded_checkpoint else {}

    def run(base: str) -> dict[str, Any]:
        import transformers.trainer

        def start() -> Any:
            given = arguments(**releases.fsdp(setup), **best)
            cpu.bridge(given)
            return given

        def make() -> Any:
            model = base_model(base)()
            for layer in model.model.layers:
                layer.self_attn.attention_dropout = 0.3
            return model

        saw = whole(start, make, evaluate=version == 2)
        if not beside:
            return saw
        trainer = trainer_of(start, base_model(base, "lora"))
        if hasattr(transformers.trainer, "update_fsdp_plugin_peft"):
            transformers.trainer.update_fsdp_plugin_peft(trainer.model, trainer.accelerator)
        else:
            trainer._fsdp_qlora_plugin_updates()
        if version == 1:
            with FullyShardedDataParallel.summon_full_params(trainer.model_wrapped, writeback=False):
                pass
        policy = trainer.accelerator.state.fsdp_plugin.auto_wrap_policy
        saw["policy"] = str(getattr(getattr(policy, "func", policy), "__name__", policy))
        return saw

    return run


def looking(version: int) -> Run:
    """FSDP without an adapter that looks for a batch size; the model is cast once it has run."""
    setup = Setup("walk", fsdp=version)

    def run(base: str) -> dict[str, Any]:
        import torch

        def start() -> Any:
            given = arguments(**releases.fsdp(setup), **WITHOUT_BEST, auto_find_batch_size=True)
            cpu.bridge(given)
            return given

        trainer = trainer_of(start, base_model(base))
        saw = trained(trainer)
        saw["cast"] = attempt(lambda: dict(trainer.model_wrapped.to(torch.bfloat16).named_parameters()))
        return saw

    return run


def of_parameters(base: str) -> dict[str, Any]:
    import peft

    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"])
    return whole(arguments, lambda: peft.get_peft_model(base_model(base)(), config))


def merged(base: str) -> dict[str, Any]:
    """An adapter that is merged after training, and taken out again."""
    trainer = trainer_of(lambda: arguments(**WITHOUT_BEST), base_model(base, "lora"))
    saw = trained(trainer)
    for name in ("merge_adapter", "unmerge_adapter"):
        getattr(trainer.model, name)()
        saw[name] = attempt(trainer.model.state_dict)
    return saw


def masked(base: str) -> dict[str, Any]:
    """AdaLora past the step at which its ranks are final."""
    import peft
    from cells import METHODS

    settings = {**METHODS["adalora_schedule"].settings, "tfinal": 2}
    callbacks = METHODS["adalora_schedule"].callbacks()
    trainer = trainer_of(
        lambda: arguments(**WITHOUT_BEST),
        lambda: peft.get_peft_model(base_model(base)(), peft.AdaLoraConfig(**settings)),
        callbacks=callbacks,
    )
    return {**trained(trainer), "save_model": attempt(lambda: trainer.save_model("trainer"))}


def native(base: str) -> dict[str, Any]:
    """A base that transformers shards itself while it loads it, without an adapter; it cannot be resumed."""
    import checkpoints

    trainer = trainer_of(
        lambda: arguments(save_only_model=True, **WITHOUT_BEST), lambda: checkpoints.load_natively(base, 2)
    )
    saw = trained(trainer)
    saw["Trainer.save_model"] = attempt(lambda: trainer.save_model("trainer"))
    saw["get_state_dict"] = attempt(lambda: trainer.accelerator.get_state_dict(trainer.model_wrapped))
    return saw


def compiled(method: str, part: Callable[[Any], Any]) -> Run:
    """A model of which a user has compiled a part, in a loop of one's own."""

    def run(base: str) -> dict[str, Any]:
        import torch
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model = part(base_model(base, method))
        optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], 1e-2)
        rows = trial.dataset(STEPS * trial.BATCH, even=True)
        model, optimizer, batches = accelerator.prepare(
            model, optimizer, torch.utils.data.DataLoader(rows, batch_size=trial.BATCH)
        )
        losses = []
        for batch in batches:
            losses.append(model(**batch).loss)
            accelerator.backward(losses[-1])
            optimizer.step()
            optimizer.zero_grad()
        saw = {"losses": plain(losses)}
        saw |= {name: attempt(way) for name, way in documented(accelerator, model).items()}
        saw["save_pretrained"] = attempt(lambda: accelerator.unwrap_model(model).save_pretrained("plain"))
        saw["kept"] = attempt(lambda: accelerator.unwrap_model(model, keep_torch_compile=True).save_pretrained("kept"))
        return saw

    return run


def in_regions(make: Callable[[], Any]) -> Any:
    from accelerate.utils import compile_regions

    return compile_regions(make(), backend="eager")


def as_a_whole(make: Callable[[], Any]) -> Any:
    import torch

    return torch.compile(make(), backend="eager")


def below(make: Callable[[], Any]) -> Any:
    """The base is compiled in place of the one that peft has wrapped."""
    import torch

    model = make()
    model.base_model.model.model = torch.compile(model.base_model.model.model, backend="eager")
    return model


def before(make: Callable[[], Any]) -> Any:
    """The base is compiled before peft wraps it."""
    import peft
    import torch

    base = torch.compile(make(), backend="eager")
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))


WITHOUT_ADAPTER: dict[str, tuple[Run, int]] = {
    "one process": (alone(), 1),
    "DDP": (ddp(), 2),
    **{f"FSDP{version}": (fsdp(version, beside=False), 2) for version in ([1, 2] if releases.has_fsdp2() else [1])},
}
"""Those that run where peft is not installed, and their ranks."""


def modules() -> list[Any]:
    from torch import nn

    return [nn.Linear(2, 2), nn.Linear(2, 2)]


IGNORED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a set": (lambda: set(modules()), len),
    "a set that grows": (lambda: set(modules()), lambda ignored: ignored.update(modules())),
    "a tuple": (lambda: tuple(modules()), len),
    "a list": (modules, len),
    "a list that grows": (modules, lambda ignored: ignored.extend(modules())),
    "a list of Parameters": (lambda: [item.weight for item in modules()], len),
    "a plain name": (lambda: "lm_head", len),
    "an expression": (lambda: r".*(lm_head|norm)", len),
    "a broken expression": (lambda: "(", len),
    "nothing": (list, len),
}
"""What a user gives accelerate's FSDP plugin as `ignored_modules`, and does with it afterwards."""


def plugins(base: str) -> dict[str, Any]:
    """What the plugin has made of it, and what was warned of meanwhile."""
    from accelerate import FullyShardedDataParallelPlugin

    versions = ({"fsdp_version": 1}, {"fsdp_version": 2}) if releases.has_fsdp2() else ({},)

    def made(make: Callable[[], Any], change: Callable[[Any], Any], version: dict[str, int]) -> Any:
        ignored = make()
        plugin = FullyShardedDataParallelPlugin(ignored_modules=ignored, use_orig_params=False, **version)
        change(ignored)
        kept = plugin.ignored_modules
        return [kept is ignored, type(kept).__name__, len(kept), plugin.use_orig_params]

    saw = {}
    for kind, (make, change) in IGNORED.items():
        with heard() as said:
            saw[kind] = [attempt(functools.partial(made, make, change, version)) for version in versions]
        saw[kind].append(said)
    return saw
