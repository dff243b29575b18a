"""Figures in the Trainer's log, where the environment asks for them: what they say is what a rank holds."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import pytest
from cells import METHODS, Bench, Setup, trial
from faults import where

from trainer_fsdp_patch import devices, sizes
from trainer_fsdp_patch.announcing import figures, start
from trainer_fsdp_patch.errors import PlanError
from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.planning.prepared import prepared_for
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome

PREFIX = "trainer_fsdp_patch/"


def held(model: Any) -> int:
    """Bytes of all parameters and buffers of this rank, each storage once, as torch has allocated them."""
    tensors = [getattr(tensor, "_local_tensor", tensor) for tensor in (*model.parameters(), *model.buffers())]
    if inventory.is_native(model):
        # On a CPU transformers has shards that are parts of a file that is mapped into memory, whole.
        return sum(tensor.nbytes for tensor in tensors)
    # FSDP1's original parameters are views of a flat one, and of other parts of it on each rank.
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def logged(setup: Setup, base: str, folder: str, method: str, asked: str, reports: list[str], rank: int) -> Outcome:
    """Train, evaluate, and keep the log's history, what the rank held, and the callbacks that are left."""
    import os

    import torch
    from transformers import Trainer, TrainerCallback
    from transformers.integrations import TensorBoardCallback

    os.environ[figures.ENVIRONMENT] = asked
    given = trial.enter(setup, folder, 2, patched=True)
    given.logging_steps = 2
    given.report_to = reports
    given.logging_dir = os.environ["TENSORBOARD_LOGGING_DIR"] = f"{folder}/board"
    os.environ.update(WANDB_MODE="offline", WANDB_DIR=folder, WANDB_SILENT="true", WANDB_CONSOLE="off")
    seen: list[int] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(held(trainer.model_wrapped))
            # Ahead of the first entry of the training.
            control.should_evaluate = state.global_step == 1

    torch.manual_seed(0)
    native = setup.name == "native"
    model = METHODS[method](checkpoints.load_natively(base, 2) if native else trial.load_base(base, setup))
    rows = trial.dataset(trial.STEPS * trial.BATCH)
    trainer = Trainer(model=model, args=given, train_dataset=rows, eval_dataset=rows, callbacks=[Look()])
    before = [type(item).__name__ for item in trainer.callback_handler.callbacks]
    trainer.train()
    # It would begin a second file, of the same name within the same second.
    trainer.remove_callback(TensorBoardCallback)
    trainer.evaluate()
    if "wandb" in reports:
        # At the end of a process it does so itself; a fork has no such end.
        import wandb

        wandb.finish()
    history = list(trainer.state.log_history)
    prepared = prepared_for(model)
    left = [type(item).__name__ for item in trainer.callback_handler.callbacks]
    extra: dict[str, Any] = {"history": history, "before": before, "left": left, "held": seen[-1]}
    if prepared is not None:
        extra |= {"line": start.line(prepared), "gathers": prepared.plan.traffic}
    return Outcome(extra=extra)


def run(
    bench: Bench,
    folder: Path,
    setup: Setup,
    method: str = "lora",
    asked: str = "1",
    *,
    reports: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    outcomes = forks.launch(logged, setup, bench.base, str(folder), method, asked, list(reports), ranks=2)
    for outcome in outcomes:
        assert not outcome.error, outcome.extra.get("traceback", outcome.error)
    return [outcome.extra for outcome in outcomes]


def ours(entry: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(PREFIX): value for key, value in entry.items() if key.startswith(PREFIX)}


def without(history: list[dict[str, Any]]) -> list[set[str]]:
    return [{key for key in entry if not key.startswith(PREFIX)} for entry in history]


@pytest.mark.parametrize("fsdp", [1, 2])
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_what_is_logged_is_what_a_rank_holds(bench: Bench, tmp_path: Path, method: str, fsdp: int) -> None:
    for extra in run(bench, tmp_path, Setup(f"f{fsdp}", fsdp=fsdp), method):
        first, *later = [entry for entry in extra["history"] if "loss" in entry or "train_loss" in entry]
        said = ours(first)
        assert said["held_bytes"] == extra["held"]
        assert f"a rank holds {sizes.size(extra['held'])} between steps" in extra["line"]
        assert (said["gathers_per_micro_batch"], said["gathered_bytes_per_micro_batch"]) == tuple(extra["gathers"])
        assert 0 < said["replicated_adapter_bytes"] < said["held_bytes"]
        assert {type(value) for value in said.values()} == {int}
        json.dumps(extra["history"])
        # Once a training, and an accelerator's peak in each of its entries; a CPU has none.
        peak = {"peak_bytes"} if devices.kind() != "cpu" else set()
        assert {frozenset(ours(entry)) for entry in later} == {frozenset(peak)}
        assert [ours(entry) for entry in extra["history"] if "eval_loss" in entry] == [{}, {}]
        assert extra["left"] == extra["before"]


@where("transformers>=5.15.dev0")
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_a_base_that_transformers_has_sharded_is_counted_as_it_did(bench: Bench, tmp_path: Path, method: str) -> None:
    for extra in run(bench, tmp_path, Setup("native", fsdp=0), method):
        said = ours(next(entry for entry in extra["history"] if "loss" in entry))
        assert said["held_bytes"] == extra["held"]
        assert said["replicated_base_bytes"] == 0
        assert not any("gather" in name for name in said)


def test_without_the_setting_the_log_is_upstreams(bench: Bench, tmp_path: Path) -> None:
    [plain, _] = run(bench, tmp_path / "plain", Setup("f2", fsdp=2), asked="")
    [asked, _] = run(bench, tmp_path / "asked", Setup("f2", fsdp=2))
    assert [ours(entry) for entry in plain["history"]] == [{}] * len(plain["history"])
    assert without(plain["history"]) == without(asked["history"])
    assert plain["history"][0]["eval_loss"] == asked["history"][0]["eval_loss"]


def test_a_run_without_a_plan_logs_no_figures(bench: Bench, tmp_path: Path) -> None:
    for extra in run(bench, tmp_path, Setup("ddp", fsdp=0)):
        assert not any(map(ours, extra["history"]))


def broken(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """A training that fails before its first entry; what is logged then, and what after `unpatch()`."""
    import os

    import torch
    from transformers import Trainer, TrainerCallback

    import trainer_fsdp_patch

    os.environ[figures.ENVIRONMENT] = "1"
    given = trial.enter(setup, folder, 2, patched=True)

    class Fails(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            raise ArithmeticError

    torch.manual_seed(0)
    model = METHODS["lora"](trial.load_base(base, setup))
    trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(4), callbacks=[Fails()])
    with pytest.raises(ArithmeticError):
        trainer.train()
    if folder.endswith("unpatched"):
        trainer_fsdp_patch.unpatch()
    trainer.log({"loss": 1.0})
    return Outcome(extra={"entry": trainer.state.log_history[-1]})


@pytest.mark.parametrize("name", ["patched", "unpatched"])
def test_after_unpatch_nothing_is_logged(bench: Bench, tmp_path: Path, name: str) -> None:
    for outcome in forks.launch(broken, Setup("f2", fsdp=2), bench.base, str(tmp_path / name), ranks=2):
        assert not outcome.error, outcome.extra.get("traceback", outcome.error)
        assert outcome.extra["entry"]["loss"] == 1.0
        assert bool(ours(outcome.extra["entry"])) == (name == "patched")


def scalars(folder: Path) -> dict[str, float]:
    """The first value of each scalar that event files have."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, float] = {}
    for file in folder.rglob("events.out.tfevents.*"):
        data, place = file.read_bytes(), 0
        while place < len(data):
            # A record: its length, a checksum of that, the record, and a checksum.
            [length] = struct.unpack("<Q", data[place : place + 8])
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4
            for value in event.summary.value:
                found.setdefault(value.tag, value.simple_value)
    return found


def test_tensorboard_shows_them(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX comes with the extra clients")
    [first, _] = run(bench, tmp_path, Setup("f2", fsdp=2), reports=("tensorboard",))
    shown = scalars(tmp_path / "board")
    assert {f"train/{PREFIX}{name}": value for name, value in ours(first["history"][1]).items()} == {
        tag: value for tag, value in shown.items() if PREFIX in tag
    }
    assert "train/loss" in shown


def entries(file: Path) -> Iterator[dict[str, Any]]:
    """What a run of wandb has logged: records of its own, in the blocks of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record = file.read_bytes(), 7, b""
    while place < len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        # A chunk: a checksum, its length, and its kind; 1 and 4 end a record.
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            items = Record.FromString(record).history.item
            record = b""
            if items:
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_wandb_shows_them(bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb comes with the extra clients")
    [first, _] = run(bench, tmp_path, Setup("f2", fsdp=2), reports=("wandb",))
    # The first rank alone writes one.
    [file] = tmp_path.rglob("*.wandb")
    shown = list(entries(file))
    assert [entry for entry in shown if any(PREFIX in key for key in entry)] == shown[1:2]
    figures_shown = {key: value for key, value in shown[1].items() if PREFIX in key}
    assert figures_shown == {f"train/{PREFIX}{name}": value for name, value in ours(first["history"][1]).items()}
    assert "train/loss" in shown[1]


@pytest.mark.parametrize(("given", "answer"), [("", False), ("0", False), ("off", False), ("1", True), ("Yes", True)])
def test_answers(monkeypatch: pytest.MonkeyPatch, given: str, answer: bool) -> None:
    monkeypatch.setenv(figures.ENVIRONMENT, given)
    assert figures.asked() is answer


def test_another_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(figures.ENVIRONMENT, "maybe")
    with pytest.raises(PlanError, match=r"No plan was made\. Use 1 or 0"):
        figures.asked()


def test_the_peak_is_the_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    counter = SimpleNamespace(max_memory_allocated=lambda device: 7)
    monkeypatch.setattr(devices, "module", lambda kind: counter)
    assert figures.peak(torch.device("cuda", 0)) == {"peak_bytes": 7}
    assert figures.peak(torch.device("cpu")) == {}
