"""Runs that are not ours, as a program sees them: what it is given, what it reads of its files, and its warnings.

Each scenario is run in ranks of its own, once stock and once patched. What it saw is turned into plain values, tensors
into a digest of their bytes, so that two sides are compared with `==`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.patching import registry
from trainer_fsdp_patch.testing import forks, releases, trial
from trainer_fsdp_patch.testing.case import Outcome, Setup

LOGGERS, STEPS = ("transformers", "accelerate", "peft", "torch", "DeepSpeed"), 3
CLOCK = ("runtime", "per_second", "preparation_time")
"""Parts of the names of values that no two runs share."""


@dataclass(frozen=True)
class Scenario:
    """A run that is not ours.

    Attributes:
        name: of the test.
        run: called in each rank, in an empty folder, with the base model's; returns what it saw by name.
        ranks: number of them.
        refused: names of what upstream itself refuses in such a run.
        method: whose architecture the base is, "" for a Llama's.
    """

    name: str
    run: Callable[[str], dict[str, Any]]
    ranks: int = 1
    refused: tuple[str, ...] = ()
    method: str = ""


def run(scenario: Scenario, base: str, folder: Path, *, patched: bool) -> dict[str, Any]:
    """What each rank saw, and the files that are left.

    Raises:
        AssertionError: a rank ended with an error that the scenario does not look at.
    """
    outcomes = _outcomes(scenario, base, folder, patched=patched)
    if not patched and any(outcome.error for outcome in outcomes):
        # A stock rank has died in CI, once in some thousand runs. What upstream loses is not what is compared here.
        shutil.rmtree(folder)
        outcomes = _outcomes(scenario, base, folder, patched=patched)
    errors = [
        f"rank {rank}: {outcome.extra.get('traceback', outcome.error)}"
        for rank, outcome in enumerate(outcomes)
        if outcome.error
    ]
    assert not errors, "\n".join(errors)
    return {"ranks": [outcome.extra["saw"] for outcome in outcomes], "files": files(folder)} | (
        {"seams": set().union(*(outcome.extra["seams"] for outcome in outcomes))} if patched else {}
    )


def _outcomes(scenario: Scenario, base: str, folder: Path, *, patched: bool) -> list[Outcome]:
    folder.mkdir(parents=True)
    return forks.launch(work, scenario, base, str(folder), patched, ranks=scenario.ranks)


def differences(stock: dict[str, Any], patched: dict[str, Any]) -> list[str]:
    """What a program sees differently, each in one line."""
    found = []
    for rank, (before, after) in enumerate(zip(stock["ranks"], patched["ranks"], strict=True)):
        found += [f"rank {rank}, {line}" for line in _differing(before, after)]
    return [*found, *_differing(stock["files"], patched["files"])]


def _differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [f"{name}: {_first(before.get(name), after.get(name))}" for name in names]


def _first(before: Any, after: Any) -> str:
    """The first place in which two plain values differ."""
    nested = isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)) and len(before) == len(after)
    if not nested:
        return f"stock {str(before)[:150]}, patched {str(after)[:150]}"
    return next(_first(one, other) for one, other in zip(before, after, strict=True) if one != other)


def work(scenario: Scenario, base: str, folder: str, patched: bool, rank: int) -> Outcome:
    """One rank of a scenario."""
    import torch
    import transformers

    import trainer_fsdp_patch

    torch.set_num_threads(1)
    os.chdir(folder)
    releases.environment()
    transformers.logging.set_verbosity_warning()
    reached: set[str] = set()
    if patched:
        note(reached)
        trainer_fsdp_patch.patch(strict=True)
    transformers.set_seed(0)
    with heard() as said:
        saw = scenario.run(base)
    return Outcome(extra={"saw": {**saw, "warnings": said}, "seams": reached})


def note(reached: set[str]) -> None:
    """Let every wrapper that is called say so."""

    def telling(name: str, function: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            reached.add(name)
            return function(*args)

        return wrapper

    for name, seam in seams():
        # wrapt asks it at each call, also where the gate is shut and the wrapper itself is not reached.
        seam.is_active = telling(name, seam.is_active)


def seams() -> list[tuple[str, Any]]:
    """Every wrapper of the patches that concern what is installed, as `patch:path`."""
    found = [patch for patch in registry.discover().values() if patch.concerns()]
    return [(f"{patch.name}:{seam.path}", seam) for patch in found for seam in patch.seams]


@contextlib.contextmanager
def heard() -> Iterator[list[tuple[str, str]]]:
    """Warnings and log records of the time, in order."""
    said: list[tuple[str, str]] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.name, record.getMessage()))

    ear = Ear(logging.WARNING)
    for name in LOGGERS:
        logging.getLogger(name).addHandler(ear)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, *_, **__: said.append((category.__name__, str(message)))
        try:
            yield said
        finally:
            for name in LOGGERS:
                logging.getLogger(name).removeHandler(ear)


def attempt(function: Callable[[], Any]) -> Any:
    """What a call gives, or what it raises, as plain values."""
    try:
        return plain(function())
    except Exception as error:
        return "raised", type(error).__name__, str(error)


def refused(value: Any) -> bool:
    """Whether plain values are, or have in them, what a call has raised."""
    return isinstance(value, (list, tuple)) and (value[:1] == ("raised",) or any(map(refused, value)))


def plain(value: Any) -> Any:
    """A value without its address: tensors by dtype, shape, device and bytes, anything else by its class."""
    import torch

    if isinstance(value, torch.Tensor):
        value = value.to_local() if hasattr(value, "to_local") else value
        kind = ("tensor", str(value.dtype), tuple(value.shape), str(value.device))
        return (
            kind if value.is_meta else (*kind, digest(bytes(value.detach().contiguous().flatten().view(torch.uint8))))
        )
    if isinstance(value, dict):
        shown = [(str(key), plain(item)) for key, item in value.items() if not any(part in str(key) for part in CLOCK)]
        return type(value).__name__, shown
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, sorted(map(str, value))
    if hasattr(value, "tobytes"):
        return type(value).__name__, str(value.dtype), value.shape, digest(value.tobytes())
    return repr(value) if isinstance(value, (bool, int, float, str, bytes, type(None))) else type(value).__name__


def digest(stored: bytes) -> str:
    return hashlib.sha1(stored, usedforsecurity=False).hexdigest()


def files(folder: Path) -> dict[str, Any]:
    """Digest of every file by its path; of those that hold a time, what they hold beside it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): content(path) for path in paths}


def content(path: Path) -> Any:
    import torch

    if path.name == "trainer_state.json":
        return plain(json.loads(path.read_text()))
    if path.name == "training_args.bin":
        return plain(vars(torch.load(path, weights_only=False)))
    if path.name == ".metadata":
        # It also has the name of the run that wrote it.
        return plain({key: str(value) for key, value in pickle.loads(path.read_bytes()).state_dict_metadata.items()})
    return path.stat().st_size, digest(path.read_bytes())


def arguments(**changes: Any) -> Any:
    """TrainingArguments of a run that saves after each step and loads the best of its checkpoints."""
    from transformers import TrainingArguments

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {
        "output_dir": "run",
        "per_device_train_batch_size": trial.BATCH // ranks,
        "per_device_eval_batch_size": trial.BATCH // ranks,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        # The worst of all, which is not the last.
        "greater_is_better": True,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_backend": "gloo" if ranks > 1 else None,
    }
    if not versions.at_least("transformers", "4.46.0"):
        settings["evaluation_strategy"] = settings.pop("eval_strategy")
    return TrainingArguments(**{**settings, **changes})


def trainer_of(start: Callable[[], Any], make: Callable[[], Any], **changes: Any) -> Any:
    import torch
    from transformers import PrinterCallback, Trainer

    given = start()
    torch.manual_seed(0)
    size = STEPS * trial.BATCH
    result = Trainer(
        model=make(), args=given, train_dataset=trial.dataset(size), eval_dataset=trial.dataset(4), **changes
    )
    result.remove_callback(PrinterCallback)
    # Releases before 4.46 do not see labels through peft.
    result.label_names = ["labels"]
    return result


def whole(
    start: Callable[[], Any], make: Callable[[], Any], *, evaluate: bool = False, **changes: Any
) -> dict[str, Any]:
    """Train, evaluate, save in all documented ways, resume from a whole checkpoint and from one of the model alone.

    Args:
        start: makes the TrainingArguments.
        make: makes the model.
        evaluate: whether to do so before training, which upstream gets wrong under DDP and DeepSpeed.
        **changes: further arguments of the Trainer.
    """
    trainer = trainer_of(start, make, **changes)
    saw = {"before": attempt(trainer.evaluate)} if evaluate else {}
    saw |= trained(trainer)
    saw |= {name: attempt(way) for name, way in ways(trainer).items()}
    saw["resumed"] = resumed(start, make, changes, ())
    saw["resumed from the model alone"] = resumed(start, make, changes, ("optimizer*", "scheduler.pt", "rng_state*"))
    return saw


def trained(trainer: Any) -> dict[str, Any]:
    loss = attempt(lambda: list(trainer.train()))
    return {"train": loss, "log": plain(trainer.state.log_history), "model": type(trainer.model_wrapped).__name__}


def ways(trainer: Any) -> dict[str, Callable[[], Any]]:
    """Every documented way to look at a model and to save it."""
    accelerator, model = trainer.accelerator, trainer.model_wrapped
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))

    def compute() -> Any:
        model.eval()
        return trainer.compute_loss(model, batch), trainer.compute_loss(model, batch, return_outputs=True)[0]

    return {
        "evaluate": trainer.evaluate,
        "predict": lambda: trainer.predict(trainer.eval_dataset),
        "compute_loss": compute,
        "Trainer.save_model": lambda: trainer.save_model("trainer"),
        **documented(accelerator, model),
    }


def documented(accelerator: Any, model: Any) -> dict[str, Callable[[], Any]]:
    """Those that accelerate's and peft's documentation have for loops of one's own."""

    def unwrapped() -> Any:
        found = accelerator.get_state_dict(model)
        bare = accelerator.unwrap_model(model)
        rank0 = accelerator.is_main_process
        bare.save_pretrained("unwrapped", is_main_process=rank0, save_function=accelerator.save, state_dict=found)
        return [type(bare).__name__, found]

    def loaded() -> Any:
        accelerator.load_state("state")
        return dict(accelerator.unwrap_model(model).named_parameters())

    return {
        "unwrapped": unwrapped,
        "get_state_dict": lambda: accelerator.get_state_dict(model),
        "get_state_dict of the wrapped": lambda: accelerator.get_state_dict(model, unwrap=False),
        "get_state_dict by position": lambda: accelerator.get_state_dict(model, False),
        "Accelerator.save_model": lambda: accelerator.save_model(model, "accelerator"),
        "save_state": lambda: [accelerator.save_state("state"), accelerator.wait_for_everyone()],
        "load_state": lambda: [
            accelerator.load_state("state"),
            dict(accelerator.unwrap_model(model).named_parameters()),
        ],
    }


def resumed(start: Callable[[], Any], make: Callable[[], Any], changes: dict[str, Any], lost: tuple[str, ...]) -> Any:
    """What the run goes on with after its last whole step, where a second disk or a user has kept this much of it."""
    trainer = trainer_of(start, make, **changes)
    if trainer.is_world_process_zero():
        last = Path("run") / f"checkpoint-{STEPS - 1}"
        shutil.rmtree(Path("run") / f"checkpoint-{STEPS}", ignore_errors=True)
        for path in [path for pattern in lost for path in last.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    trainer.accelerator.wait_for_everyone()
    losses: list[float] = []
    step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: losses.append(loss := step(*args, **kwargs)) or loss
    return [attempt(lambda: list(trainer.train(resume_from_checkpoint=True))), plain(losses)]


def base_model(base: str, method: str = "", **changes: Any) -> Callable[[], Any]:
    """Makes a model anew, with a method of the matrix on it where one is named."""

    def make() -> Any:
        setup = dataclasses.replace(Setup("walk"), **changes)
        if not method:
            return trial.load_base(base, setup)
        from cells import METHODS

        return METHODS[method](METHODS[method].load(base, setup))

    return make
