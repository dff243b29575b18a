"""A run says in one line on rank 0 what its plan is, where a Trainer's user sees it, and what it says is so."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from cells import METHODS, Bench, Setup, trial
from faults import where

from trainer_fsdp_patch import sizes
from trainer_fsdp_patch.announcing import start
from trainer_fsdp_patch.planning.prepared import prepared_for
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "trainer_fsdp_patch" in record.getMessage():
            self.kept.append(record.getMessage())


def listened(setup: Setup, base: str, folder: str, level: str | None, rank: int) -> Outcome:
    """Evaluate, train twice, and keep what transformers' loggers were told, and how often a step gathered."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import Trainer, TrainerCallback
    from transformers import logging as theirs

    given = trial.enter(setup, folder, 2, patched=setup.name != "stock")
    lines, counts, per_step = Lines(), [], []
    theirs.add_handler(lines)
    theirs.set_verbosity_warning()
    given.log_level = level or "passive"

    class Gathers(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d" and "allgather" in str(func).replace("_", ""):
                counts.append(1)
            return func(*args, **(kwargs or {}))

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            counts.clear()
            self.mode = Gathers()
            self.mode.__enter__()

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.mode.__exit__(None, None, None)
            per_step.append(len(counts))

    torch.manual_seed(0)
    native = setup.name == "native"
    model = METHODS["lora"](checkpoints.load_natively(base, 2) if native else trial.load_base(base, setup))
    rows = trial.dataset(trial.STEPS * trial.BATCH)
    trainer = Trainer(model=model, args=given, train_dataset=rows, eval_dataset=rows, callbacks=[Steps()])
    if setup.name != "stock":
        trainer.evaluate()
    before = list(lines.kept)
    trainer.train()
    trainer.train()
    prepared = prepared_for(model)
    extra: dict[str, Any] = {"before": before, "lines": lines.kept, "gathers": per_step}
    if prepared is not None:
        extra |= {"line": start.line(prepared), "plan": prepared.plan.traffic}
    return Outcome(extra=extra)


def heard(bench: Bench, setup: Setup, folder: Path, level: str | None = None) -> list[dict[str, Any]]:
    outcomes = forks.launch(listened, setup, bench.base, str(folder), level, ranks=2)
    for outcome in outcomes:
        assert not outcome.error, outcome.extra.get("traceback", outcome.error)
    return [outcome.extra for outcome in outcomes]


@pytest.mark.parametrize("fsdp", [1, 2])
def test_rank_0_says_one_line_when_training_starts(bench: Bench, tmp_path: Path, fsdp: int) -> None:
    first, second = heard(bench, Setup(f"f{fsdp}", fsdp=fsdp), tmp_path)
    assert first["before"] == []
    assert first["lines"] == [f"trainer_fsdp_patch: {first['line']}"]
    assert second["lines"] == []
    assert first["line"].startswith(f"FSDP{fsdp} shards ")
    # The first step of FSDP1 sets itself up, and an evaluation left units as they were.
    assert first["gathers"][-1] == first["plan"][0]
    assert f"gather {first['plan'][0]} units" in first["line"]


@where("transformers>=5.15.dev0")
def test_a_base_that_transformers_has_sharded_has_its_line_too(bench: Bench, tmp_path: Path) -> None:
    first, second = heard(bench, Setup("native", fsdp=0), tmp_path)
    assert (first["before"], first["lines"], second["lines"]) == ([], [f"trainer_fsdp_patch: {first['line']}"], [])
    assert first["line"].startswith("transformers shards ")
    assert "over 2 ranks" in first["line"]


def test_a_user_silences_it_as_any_line_of_transformers(bench: Bench, tmp_path: Path) -> None:
    assert heard(bench, Setup("f2", fsdp=2), tmp_path, level="error")[0]["lines"] == []


def test_a_run_that_is_not_planned_says_nothing(bench: Bench, tmp_path: Path) -> None:
    assert heard(bench, Setup("ddp", fsdp=0), tmp_path)[0]["lines"] == []


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**51, "2048.0 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert sizes.size(count) == text
