"""The matrix: every method times every set-up, stock beside patched, each against one process.

`python tests/matrix.py` runs all of it and prints the counts; `--only TEXT` keeps the cells whose name has TEXT.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import peft
import torch
from peft import get_peft_model

from trainer_fsdp_patch import checking, trial, versions
from trainer_fsdp_patch.trial import Outcome, Setup, Verdict

checking.import_targets()
with warnings.catch_warnings(), contextlib.suppress(ImportError):
    warnings.simplefilter("ignore")
    import bitsandbytes  # noqa: F401

for _package in versions.NEWEST_TESTED:
    if versions.newer_than_tested(_package):
        # `nox -s upcoming` finds out whether it can be called tested; strict patches would refuse it.
        versions.NEWEST_TESTED[_package] = str(versions.installed(_package))

TARGETS = ["q_proj", "o_proj"]


def _adapter(config: str, **settings: Any) -> Any:
    """A configure function for `trial.run`, by the name of peft's configuration class."""

    def configure(model: Any) -> Any:
        return get_peft_model(model, getattr(peft, config)(target_modules=TARGETS, **settings))

    return configure


def _pvera(model: Any) -> Any:
    """PVeRA with noise that depends on the position only, so that ranks can be compared with one process."""
    from peft.tuners.pvera.layer import PveraLayer

    def reparametrize(self: Any, mu: Any, logvar: Any, adapter_name: str) -> Any:
        if not self.training:
            return mu
        return mu + torch.sin(torch.arange(mu.shape[-1])).to(mu) * torch.exp(0.5 * logvar)

    PveraLayer._reparametrize = reparametrize
    return _adapter("PveraConfig", r=8, projection_prng_key=1, d_initial=0.1)(model)


CONFIGS = {
    "randlora": "RandLoraConfig",
    "vblora": "VBLoRAConfig",
    "pvera": "PveraConfig",
    "tinylora": "TinyLoraConfig",
    "unilora": "UniLoraConfig",
    "frod": "FrodConfig",
}
"""Configuration classes that not every supported peft has, by method."""


def has(method: str) -> bool:
    """Whether the installed peft has a method; before 0.20 nothing can make PVeRA's noise the same on all ranks."""
    comparable = method != "pvera" or versions.at_least("peft", "0.20.0")
    return comparable and hasattr(peft, CONFIGS.get(method, "LoraConfig"))


METHODS = {
    "vera": _adapter("VeraConfig", r=8, projection_prng_key=1, d_initial=0.1),
    "vera_noproj": _adapter("VeraConfig", r=8, projection_prng_key=1, d_initial=0.1, save_projection=False),
    "pvera": _pvera,
    "randlora": _adapter("RandLoraConfig", r=8, randlora_alpha=8),
    "vblora": _adapter("VBLoRAConfig", r=4, num_vectors=16, vector_length=16),
    "unilora": _adapter("UniLoraConfig", r=4, theta_d_length=64),
    "tinylora": _adapter("TinyLoraConfig", r=2, u=8),
    "frod": _adapter("FrodConfig", progressbar=False),
    "lora": _adapter("LoraConfig", r=4),
    "dora": _adapter("LoraConfig", r=4, use_dora=True),
}

with_a_head = _adapter("LoraConfig", r=4, modules_to_save=["lm_head"])

_KINDS = [
    Setup("fp32"),
    Setup("bf16", dtype="bfloat16"),
    Setup("amp", amp="bf16"),
    Setup("bf16+amp", dtype="bfloat16", amp="bf16"),
    Setup("4bit-uint8", dtype="bfloat16", storage="uint8"),
    Setup("4bit-uint8+amp", dtype="bfloat16", storage="uint8", amp="bf16"),
    Setup("4bit-bf16", dtype="bfloat16", storage="bfloat16"),
    Setup("4bit-bf16+amp", dtype="bfloat16", storage="bfloat16", amp="bf16"),
    Setup("4bit-fp32", storage="float32"),
    Setup("4bit-fp32+amp", storage="float32", amp="bf16"),
    Setup("8bit", dtype="bfloat16", storage="8bit"),
    Setup("8bit+amp", dtype="bfloat16", storage="8bit", amp="bf16"),
    Setup("accumulate", accumulation=3, checkpointing=True),
    Setup("amp+accumulate", accumulation=3, checkpointing=True, amp="bf16"),
    Setup("clip+sgd", clip=0.01, optim="sgd"),
    Setup("ac", activation_checkpointing=True),
]


def setups() -> list[Setup]:
    """Every kind of base and training on FSDP1 with both values of use_orig_params, and on FSDP2."""
    flavours: list[tuple[str, dict[str, Any]]] = [
        ("f1", {"fsdp": 1}),
        ("f1-flat", {"fsdp": 1, "use_orig_params": False}),
        ("f2", {"fsdp": 2}),
    ]
    found = [
        dataclasses.replace(kind, name=f"{flavour} {kind.name}", **changes)
        for flavour, changes in flavours
        for kind in _KINDS
    ]
    found += [
        Setup("f2 ram", ram_efficient=True),
        Setup("f2 ram+amp", ram_efficient=True, amp="bf16"),
        Setup("ddp fp32", fsdp=0),
    ]
    return found


def reference_of(setup: Setup) -> Setup:
    """The same training in one process, where FSDP's own settings mean nothing."""
    return dataclasses.replace(
        setup,
        name="one",
        fsdp=0,
        use_orig_params=True,
        ram_efficient=False,
        sharded=False,
        checkpointing=setup.checkpointing or setup.activation_checkpointing,
        activation_checkpointing=False,
    )


class Bench:
    """Runs cells below one folder and keeps the one-process references, which many cells share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = str(folder / "base")
        child = multiprocessing.get_context("fork").Process(target=trial.tiny_base, args=(folder / "base",))
        child.start()
        child.join()
        self.reference = functools.cache(self._reference)

    def _reference(self, method: str, setup: Setup) -> Outcome:
        where = self.folder / f"reference-{method}-{abs(hash(setup))}"
        return trial.run(setup, METHODS[method], self.base, where, ranks=1, patched=False)

    def cell(self, method: str, setup: Setup, *, patched: bool) -> tuple[Outcome, Verdict]:
        where = self.folder / f"{method}-{setup.name}-{patched}".replace(" ", "_")
        outcome = trial.run(setup, METHODS[method], self.base, where, patched=patched)
        return outcome, trial.compare(outcome, self.reference(method, reference_of(setup)), setup)

    def resumed(self, configure: Callable[[Any], Any], setup: Setup, name: str, *, patched: bool) -> str:
        """Train, save a resume checkpoint on the way and the adapter at the end, and resume; "" where all is right.

        The reference is `name`'s too: cells that share it have to be the same training.
        """
        one = self.named(name, configure, reference_of(setup))
        if one.error:
            return f"no reference: {one.error}"
        where = self.folder / f"{name} {setup.name} {patched}"
        writing = dataclasses.replace(setup, save_steps=trial.STEPS - 1)
        verdict = trial.compare(trial.run(writing, configure, self.base, where, patched=patched), one, setup)
        if not verdict.right:
            return verdict.error
        resuming = dataclasses.replace(setup, resume=str(where / f"checkpoint-{trial.STEPS - 1}"))
        again = trial.run(resuming, configure, self.base, Path(f"{where} again"), patched=patched)
        if not again.error and len(again.losses) != 1:
            return f"resumed: it took {len(again.losses)} steps instead of 1"
        verdict = trial.compare(again, one, setup)
        return "" if verdict.right else f"resumed: {verdict.error}"

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
    parser.add_argument("--json", help="write one row for each cell to this file")
    given = parser.parse_args()
    cells = [(method, setup) for setup in setups() for method in METHODS if given.only in f"{method} {setup.name}"]
    counts: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for method, setup in cells:
            missing = bench.has_reference(method, setup)
            row: dict[str, Any] = {"method": method, "setup": setup.name, "reference": missing or "ok"}
            for patched in [True] if given.no_stock else [False, True]:
                if missing:
                    counts[patched]["no reference"] += 1
                    continue
                _, verdict = bench.cell(method, setup, patched=patched)
                counts[patched]["right" if verdict.right else "wrong"] += 1
                row["patched" if patched else "stock"] = {"error": verdict.error, "worst": verdict.worst}
                if patched and not verdict.right:
                    print(f"WRONG {method} {setup.name}: {verdict.error}", flush=True)
            if missing:
                print(f"no reference {method} {setup.name}: {missing[:110]}", flush=True)
            rows.append(row)
    if given.json:
        Path(given.json).write_text(json.dumps(rows, indent=1) + "\n")
    for patched, count in counts.items():
        total = sum(count.values())
        print(f"{'patched' if patched else 'stock':8} {total} cells:", ", ".join(f"{n} {k}" for k, n in count.items()))
    return int(counts[True]["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
