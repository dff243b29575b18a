"""The matrix: every method times every set-up, stock beside patched, each against one process.

`python tests/matrix/cells.py` runs all of it and prints the counts; `--only TEXT` keeps the cells whose name has TEXT.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer_fsdp_patch import devices
from trainer_fsdp_patch.testing import case, forks

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    devices.keep_forkable()
    from architectures import ARCHITECTURES, LLAMA, Architecture
    from methods import METHODS, ON_ARCHITECTURES, ON_LLAMA

from trainer_fsdp_patch.measuring.footprint import Footprint
from trainer_fsdp_patch.testing import beyond, targets, trial
from trainer_fsdp_patch.testing.case import Outcome, Setup, Verdict

targets.import_all()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    if devices.kind() == "cpu":
        # Each asks an accelerator what it can do. That begins its runtime, and such a parent can fork no rank.
        with contextlib.suppress(ImportError):
            import bitsandbytes  # noqa: F401
        with contextlib.suppress(ImportError):
            # accelerate imports it for every accelerator.
            import deepspeed  # noqa: F401


def has(method: str) -> bool:
    """Whether the installed peft has a method, LoRA's where the name is none."""
    return METHODS.get(method, METHODS["lora"]).exists


with_a_head = METHODS["lora_head"]

_B16: dict[str, Any] = {"dtype": "bfloat16", "amp": "bf16"}
_KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": "bfloat16"},
    "amp": {"amp": "bf16"},
    "bf16+amp": _B16,
    "4bit-uint8+amp": {**_B16, "storage": "uint8"},
    "4bit-bf16+amp": {**_B16, "storage": "bfloat16"},
    "4bit-fp32+amp": {"storage": "float32", "amp": "bf16"},
    "8bit": {"dtype": "bfloat16", "storage": "8bit"},
    "amp+accumulate": {"accumulation": 3, "checkpointing": True, "amp": "bf16"},
    "clip+sgd": {"clip": 0.01, "optim": "sgd"},
    "ac": {"activation_checkpointing": True},
    "ram": {"ram_efficient": True},
    "ram+amp": {"ram_efficient": True, "amp": "bf16"},
    "size": {"wrap": "size"},
    "no-wrap": {"wrap": "none"},
    "3-ranks": {"ranks": 3, "batch": 6},
    "hybrid": {"ranks": 4, "hybrid": True},
    "shard": {"placement": "shard"},
    "shard+bf16": {"placement": "shard", **_B16},
    "shard+4bit": {"placement": "shard", **_B16, "storage": "bfloat16"},
    "shard+ram": {"placement": "shard", "ram_efficient": True},
    "shard+accumulate": {"placement": "shard", "accumulation": 3, "checkpointing": True, "clip": 0.01},
    "fp16": {"dtype": "float16"},
    "8bit+amp": {**_B16, "storage": "8bit"},
    "4bit-uint8": {"dtype": "bfloat16", "storage": "uint8"},
    "4bit-bf16": {"dtype": "bfloat16", "storage": "bfloat16"},
    "4bit-fp16": {"dtype": "float16", "storage": "float16"},
    "4bit-fp32": {"storage": "float32"},
    "fp4-double": {**_B16, "storage": "uint8", "kind": "fp4-double"},
    "nf4-double": {**_B16, "storage": "bfloat16", "kind": "nf4-double"},
    "hqq": {"dtype": "bfloat16", "quantizer": "hqq"},
    "gptq": {**_B16, "quantizer": "gptq"},
    "gptq+ram": {**_B16, "quantizer": "gptq", "ram_efficient": True},
    "torchao-int8": {**_B16, "quantizer": "torchao-int8"},
    "torchao-int4": {**_B16, "quantizer": "torchao-int4"},
    "quanto-int8": {**_B16, "quantizer": "quanto-int8"},
    "quanto-int4": {**_B16, "quantizer": "quanto-int4"},
}
_TRAINING = ["fp32", "amp", "4bit-uint8+amp", "4bit-bf16+amp", "8bit", "amp+accumulate"]
_LAYOUTS = ["no-wrap", "3-ranks", "hybrid"]
_SHARDED = ["shard", "shard+bf16", "shard+4bit", "shard+accumulate"]
_BASES = [name for name in list(_KINDS)[list(_KINDS).index("fp16") :] if name != "gptq+ram"]


def _on(fsdp: str, *kinds: str) -> list[Setup]:
    flavours = {"f1": {"fsdp": 1}, "f1-flat": {"fsdp": 1, "use_orig_params": False}, "f2": {"fsdp": 2}}
    return [Setup(f"{fsdp} {kind}", **flavours[fsdp], **_KINDS[kind]) for kind in kinds]


DDP = Setup("ddp fp32", fsdp=0)
GROUPS: list[tuple[list[str], list[Setup]]] = [
    (
        list(ON_LLAMA),
        [
            *_on("f1", "bf16", "size", *_TRAINING),
            *_on("f1-flat", "clip+sgd"),
            *_on("f2", "bf16+amp", "4bit-fp32+amp", "clip+sgd", "ac", "ram", "ram+amp", "size", *_TRAINING),
            DDP,
        ],
    ),
    (list(ON_ARCHITECTURES), [*_on("f1", "fp32", "amp", "size"), *_on("f2", "fp32", "amp", "ram", "size")]),
    (["vera", "lora", "lora_head", "trainable_tokens", "prefix"], [*_on("f1", *_LAYOUTS), *_on("f2", *_LAYOUTS)]),
    (["vera", "lora", "dora", "lora_head"], [*_on("f1", *_SHARDED), *_on("f2", "shard+ram", *_SHARDED)]),
    (["vera", "lora", "ia3"], [*_on("f1", *_BASES), *_on("f2", "gptq+ram", *_BASES)]),
]
"""Every method on a Llama, and a few on other architectures, layouts of ranks, sharded adapters and kinds of base."""


def cells() -> list[tuple[str, Setup]]:
    """Every cell of the matrix, as method and set-up."""
    return [(method, setup) for methods, setups in GROUPS for setup in setups for method in methods]


def setups() -> list[Setup]:
    """Every set-up once."""
    return list({setup.name: setup for _, setup in cells()}.values())


def reference_of(setup: Setup) -> Setup:
    """The same training in one process, where FSDP's own settings mean nothing."""
    return dataclasses.replace(
        setup,
        name="one",
        fsdp=0,
        use_orig_params=True,
        ram_efficient=False,
        sharded_checkpoint=False,
        wrap="",
        placement="auto",
        budget="",
        ranks=1,
        batch=setup.batch,
        hybrid=False,
        checkpointing=setup.checkpointing or setup.activation_checkpointing,
        activation_checkpointing=False,
    )


class Bench:
    """Runs cells below one folder and keeps the one-process references, which many cells share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = self.base_of(LLAMA)
        self.reference = functools.cache(self._reference)
        self.took: dict[tuple[str, str, bool], Footprint | None] = {}

    @functools.cache  # noqa: B019
    def base_of(self, architecture: Architecture) -> str:
        """Folder of an architecture's base model; the parent computes nothing, so that it can be forked."""
        where = self.folder / "bases" / str(next(n for n, item in ARCHITECTURES.items() if item is architecture))
        child = multiprocessing.get_context("fork").Process(target=architecture.write, args=(where,))
        child.start()
        child.join()
        return str(where)

    def _reference(self, method: str, setup: Setup) -> Outcome:
        where = self.folder / f"reference-{method}-{abs(hash(setup))}"
        return trial.run(
            setup, METHODS[method], self.base_of(METHODS[method].architecture), where, ranks=1, patched=False
        )

    def cell(self, method: str, setup: Setup, *, patched: bool) -> tuple[Outcome, Verdict]:
        where = self.folder / f"{method}-{setup.name}-{patched}".replace(" ", "_")
        outcome = trial.run(setup, METHODS[method], self.base_of(METHODS[method].architecture), where, patched=patched)
        return outcome, case.compare(outcome, self.reference(method, reference_of(setup)), setup)

    def resumed(self, configure: Callable[[Any], Any], setup: Setup, name: str, *, patched: bool) -> str:
        """Train, save a resume checkpoint on the way and the adapter at the end, and resume; "" where all is right.

        The reference is `name`'s too: cells that share it have to be the same training. What the first run took of a
        rank is kept in `took`.
        """
        one = self.named(name, configure, reference_of(setup))
        if one.error:
            return f"no reference: {one.error}"
        where = self.folder / f"{name} {setup.name} {patched}"
        writing = dataclasses.replace(setup, save_steps=trial.STEPS - 1)
        first = trial.run(writing, configure, self.base, where, patched=patched)
        self.took[name, setup.name, patched] = first.footprint
        verdict = case.compare(first, one, setup)
        if not verdict.right:
            return verdict.error
        resuming = dataclasses.replace(setup, resume=str(where / f"checkpoint-{trial.STEPS - 1}"))
        again = trial.run(resuming, configure, self.base, Path(f"{where} again"), patched=patched)
        if again.error and (why := self.one_cannot_resume(name, configure, reference_of(setup))):
            return f"no reference: one process does not resume: {why}"
        if not again.error and len(again.losses) != 1:
            return f"resumed: it took {len(again.losses)} steps instead of 1"
        verdict = case.compare(again, one, setup)
        return "" if verdict.right else f"resumed: {verdict.error}"

    @functools.cache  # noqa: B019
    def one_cannot_resume(self, name: str, configure: Callable[[Any], Any], setup: Setup) -> str:
        """Why one process of stock cannot resume from its own checkpoint, or ""."""
        where = self.folder / f"{name} one resumes {abs(hash(setup))}"
        writing = dataclasses.replace(setup, save_steps=trial.STEPS - 1)
        trial.run(writing, configure, self.base, where, ranks=1, patched=False)
        resuming = dataclasses.replace(setup, resume=str(where / f"checkpoint-{trial.STEPS - 1}"))
        return trial.run(resuming, configure, self.base, Path(f"{where} again"), ranks=1, patched=False).error

    @functools.cache  # noqa: B019
    def named(self, name: str, configure: Callable[[Any], Any], setup: Setup) -> Outcome:
        where = self.folder / f"{name} one {abs(hash(setup))}"
        return trial.run(setup, configure, self.base, where, ranks=1, patched=False)

    def has_reference(self, method: str, setup: Setup) -> str:
        """Why one process gives nothing to compare with, or ""."""
        one = self.reference(method, reference_of(setup))
        if one.error:
            return one.error
        if not all(math.isfinite(norm) and norm > 0 for norm in one.norms):
            return "one process does not train either: its gradient is 0"
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="keep cells whose `method setup` contains this")
    parser.add_argument("--no-stock", action="store_true", help="leave the unpatched side out")
    parser.add_argument("--json", help="write one row for each cell to this file; with --only, its rows alone")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    given = parser.parse_args()
    chosen = [(method, setup) for method, setup in cells() if given.only in f"{method} {setup.name}"]
    rows = measured(chosen, SIDES[1:] if given.no_stock else SIDES, given.jobs)
    if given.json:
        rows = replaced(Path(given.json), rows) if given.only else rows
        Path(given.json).write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    for side in SIDES[1:] if given.no_stock else SIDES:
        print(counts(rows, side))
    return int(any(state(row, "patched") == "wrong" for row in rows))


Row = dict[str, Any]
SIDES = ("stock", "patched")
STATES = ("right", "refused", "wrong", "no reference")


def counts(rows: list[Row], side: str) -> str:
    """One line: how many cells of a side are in each of STATES."""
    found = Counter(state(row, side) for row in rows)
    return f"{side:8} {len(rows)} cells: {', '.join(f'{found[name]} {name}' for name in STATES)}"


def measured(chosen: list[tuple[str, Setup]], sides: Sequence[str], jobs: int) -> list[Row]:
    """Rows of cells, by so many processes at a time; a method is one process's, for the sake of its references."""
    # Stock runs that hang do so for ever; a cell takes about a second.
    forks.TIMEOUT = 15.0
    methods = list(dict.fromkeys(method for method, _ in chosen))
    with tempfile.TemporaryDirectory() as folder:

        def work(job: int) -> None:
            bench = Bench(Path(folder) / str(job))
            mine = [cell for cell in chosen if methods.index(cell[0]) % jobs == job]
            rows = [measure(bench, method, setup, sides=sides) for method, setup in mine]
            Path(f"{folder}/{job}.json").write_text(json.dumps(rows))

        workers = [multiprocessing.get_context("fork").Process(target=work, args=(job,)) for job in range(jobs)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        rows = [row for job in range(jobs) for row in json.loads(Path(f"{folder}/{job}.json").read_text())]
    places = {(method, setup.name): place for place, (method, setup) in enumerate(chosen)}
    return sorted(rows, key=lambda row: places[row["method"], row["setup"]])


def replaced(record: Path, rows: list[Row]) -> list[Row]:
    """Rows of an earlier record, and these in place of theirs."""
    known = {(row["method"], row["setup"]): row for row in (*json.loads(record.read_text()), *rows)}
    return [known[method, setup.name] for method, setup in cells()]


MORE_AT_ONCE = {("shadow", "f2 ac"): "gathered at once, stock has"}
"""Cells that gather more at once than stock, by what is said of them.

FSDP2 gathers the next unit before it frees the last. Below activation checkpointing stock has a unit of Shadow's
adapter between any two blocks, and gathers those next, in twice as many collectives.
"""


def measure(bench: Bench, method: str, setup: Setup, *, sides: Sequence[str] = SIDES) -> Row:
    """One cell: for each side "" or what is wrong and what it took, or why there is no reference to compare with.

    A patched run that equals one process is wrong where it takes more of a rank than its plan says, or than stock.
    """
    row: Row = {"method": method, "setup": setup.name}
    missing = bench.has_reference(method, setup)
    if missing:
        print(f"no reference {method} {setup.name}: {missing[:110]}", flush=True)
        return {**row, "reference": missing}
    took: dict[str, Footprint | None] = {}
    for side in sides:
        outcome, verdict = bench.cell(method, setup, patched=side == "patched")
        row[side], took[side] = verdict.error, outcome.footprint
    row["took"] = {side: numbers(taken) for side, taken in took.items() if taken}
    # In stock PEFT's wrap policy overrides units by size, and that there be none.
    stock = None if setup.wrap else took.get("stock")
    more = beside(took["patched"], stock)
    known = MORE_AT_ONCE.get((method, setup.name))
    if known and stock and not row["patched"]:
        more = "" if known in more else f"listed in MORE_AT_ONCE, and takes no more than stock: {more or 'take it out'}"
    row["patched"] = row["patched"] or more
    if state(row, "patched") in ("wrong", "refused"):
        print(f"{state(row, 'patched').upper()} {method} {setup.name}: {row['patched']}", flush=True)
    return row


def numbers(taken: Footprint) -> list[int | None]:
    """A footprint in a record; the number of ranks is the set-up's."""
    return [taken.units, taken.rest, taken.base, taken.replicated, taken.gathered, taken.collectives]


def beside(patched: Footprint | None, stock: Footprint | None) -> str:
    """What a patched run takes beyond stock, or ""."""
    return beyond.fault(patched, None, stock) if patched else ""


def state(row: Row, side: str) -> str:
    """One of STATES."""
    if "reference" in row:
        return "no reference"
    if row[side].startswith("PlanError"):
        return "refused"
    return "wrong" if row[side] else "right"


if __name__ == "__main__":
    sys.exit(main())
