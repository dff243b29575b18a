"""Settings that the matrix varies one at a time, drawn together by a seed, each run against one process.

`python tests/matrix/mixed.py --seed 1 --cells 200` prints the runs that are not right, each with the fewest settings
that still make it so, and what stock does with those. It ends with 1 where there are any. A run that is right in fp32
and off in 16 bits is printed and does not count: tensors that are stored and stepped in 16 bits round most of it away.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import METHODS, Bench
from methods import ON_LLAMA

from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Setup

Settings = dict[str, Any]

_B16 = {"dtype": "bfloat16"}
NONE = {"wrap": "none"}
PARTS: dict[str, Sequence[Settings]] = {
    "numbers": [{}, {}, _B16, {"amp": "bf16"}, {**_B16, "amp": "bf16"}],
    "base": [
        *({} for _ in range(5)),
        {"storage": "uint8"},
        {"storage": "uint8", "kind": "fp4-double"},
        {"storage": "bfloat16", "kind": "nf4-double"},
        {"storage": "float32"},
        {"storage": "8bit"},
        *({"quantizer": name} for name in ("hqq", "gptq", "torchao-int8", "torchao-int4")),
        *({"quantizer": name} for name in ("quanto-int8", "quanto-int4")),
    ],
    "checkpointing": [{}, {}, {"checkpointing": True}, {"activation_checkpointing": True}],
    "loading": [{}, {"ram_efficient": True}],
    "wrap": [{}, {}, {"wrap": "size"}, NONE],
    "ranks": [{}, {}, {}, {"ranks": 3, "batch": 6}, {"ranks": 4}, {"ranks": 4, "hybrid": True}],
    "placement": [{}, {"placement": "shard"}, {"placement": "replicate"}],
    "budget": [{}, {"budget": "30%"}, {"budget": "60%"}, {"budget": "100%"}],
    "accumulation": [{}, {}, {"accumulation": 3}],
    "clip": [{}, {"clip": 0.01}],
    "optim": [{}, {}, {"optim": "sgd"}, {"optim": "adafactor"}],
    "attention": [{}, {"attention": "sdpa"}],
    "flat": [{}, {"use_orig_params": False}],
    "saving": [{}, {"save_steps": 2}, {"save_steps": 2, "sharded_checkpoint": True}],
}
"""Each run has one choice of each part; what stands twice comes twice as often."""


def draw(chance: random.Random) -> tuple[str, int, Settings]:
    """A method, a version of FSDP, and settings by part, of those that go together in stock without an adapter too."""
    method, fsdp = chance.choice(list(METHODS)), chance.choice((1, 2))
    chosen = {part: chance.choice(choices) for part, choices in PARTS.items()}
    # FSDP1 hands out what one rank has loaded by an accelerator alone.
    out = {"loading"} if fsdp == 1 else {"flat"}
    if method not in ON_LLAMA:
        out |= {"base", "saving", "attention"}
    # Layers that are computed again fill a cache twice. accelerate's FSDP2 asks the policy, of which there is none.
    without = fsdp == 2 and chosen["wrap"] == NONE
    if "activation_checkpointing" in chosen["checkpointing"] and (method not in ON_LLAMA or without):
        out.add("checkpointing")
    # One process takes two parts of a batch.
    if METHODS[method].micro:
        out.add("ranks")
    # Its steps have one size, however small the gradient: the noise of 16 bits decides.
    if chosen["optim"].get("optim") == "adafactor" and (chosen["numbers"] or chosen["base"]):
        out.add("optim")
    # peft keeps no part of a schedule in a checkpoint.
    if method in ("adalora_schedule", "adamss_schedule"):
        out.add("saving")
    return method, fsdp, {part: settings for part, settings in chosen.items() if settings and part not in out}


def setup_of(fsdp: int, chosen: Settings) -> Setup:
    """The set-up of some settings; its name says all of them."""
    settings = {key: value for part in chosen.values() for key, value in part.items()}
    words = [f"f{fsdp}", *(f"{key}={value}" for key, value in settings.items())]
    return Setup(" ".join(words), fsdp=fsdp, **settings)


def verdict(bench: Bench, method: str, setup: Setup, *, patched: bool = True) -> str:
    """What is wrong with a run, "" where it is right, or "no reference: ...", as one process has none to give."""
    plain = dataclasses.replace(setup, save_steps=0)
    missing = bench.has_reference(method, plain)
    if missing:
        return f"no reference: {missing}"
    if setup.save_steps:
        return bench.resumed(METHODS[method], plain, method, patched=patched)
    return bench.cell(method, setup, patched=patched)[1].error


def smallest(bench: Bench, method: str, fsdp: int, chosen: Settings) -> tuple[Settings, str]:
    """The fewest of some settings with which the run is not right either, and what it says."""
    found = verdict(bench, method, setup_of(fsdp, chosen))
    for part in list(chosen):
        fewer = {key: value for key, value in chosen.items() if key != part}
        error = verdict(bench, method, setup_of(fsdp, fewer))
        if error and not error.startswith(("no reference", "PlanError")):
            chosen, found = fewer, error
    return chosen, found


def kind_of(error: str) -> str:
    if not error:
        return "right"
    return next((name for name in ("no reference", "PlanError") if error.startswith(name)), "wrong")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after these")
    parser.add_argument("--json", type=Path, help="append a line for each run")
    given = parser.parse_args(arguments)
    forks.TIMEOUT = 40.0
    chance, counts = random.Random(given.seed), Counter[str]()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for _ in range(given.cells):
            method, fsdp, chosen = draw(chance)
            if time.monotonic() - begun > given.seconds:
                break
            setup = setup_of(fsdp, chosen)
            error = verdict(bench, method, setup)
            counts[kind_of(error)] += 1
            line = {"method": method, "setup": setup.name, "error": error}
            if kind_of(error) == "PlanError":
                print(f"REFUSED {method} {setup.name}: {error[:300]}", flush=True)
            if kind_of(error) == "wrong":
                fewest, error = smallest(bench, method, fsdp, chosen)
                fewer = setup_of(fsdp, fewest)
                stock = verdict(bench, method, fewer, patched=False)
                # What needs 16 bits to be off was right without them.
                rounded = error.startswith("off by") and "numbers" in fewest
                counts.update({"wrong": -1, "off in 16 bits alone": 1} if rounded else {})
                print(f"{'ROUNDED' if rounded else 'WRONG'} {method} {fewer.name}: {error[:300]}", flush=True)
                print(f"      drawn: {setup.name}\n      stock: {stock[:200] or 'right'}", flush=True)
                line |= {"fewest": fewer.name, "stock": stock}
            if given.json:
                with given.json.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    print(", ".join(f"{count} {name}" for name, count in counts.items() if count))
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
