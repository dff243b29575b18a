"""What a training step costs: stock, patched, DDP, and one process without either, in one run on two CPU ranks.

    python benchmarks/steps.py [--methods LoRA VeRA QLoRA QVeRA] [--fsdp 1 2] [--budgets 0 25 50 100] [--repeat 3]
                               [--steps 8] [--width 512] [--keep FILE] [--markdown] [--counts] [--plot FILE]

Each round trains every side of every case in turn, so that all see the same machine. Shown are medians over the steps
of all rounds, and the ratio to stock. The floor is one process with a rank's batch, alone on the machine. Counts come
from a further step, since counting slows a step down: collectives, MiB of their largest tensors, and the most bytes of
parameters that a rank has at once. The model is `adapter_step.py`'s, fp32; quantized bases are nf4 with the default
storage, with which stock's FSDP does not start. Budgets are percentages that `patch(base_budget=...)` gets, where it
takes one.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from adapter_step import base, lora, vera
from counting import Count
from tables import machine, show

import trainer_fsdp_patch
from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.measuring import footprint
from trainer_fsdp_patch.testing import forks, targets, trial
from trainer_fsdp_patch.testing.case import Outcome, Setup

WARM = 2
"""Steps that are not counted."""

METHODS = {"LoRA": (lora, ""), "VeRA": (vera, ""), "QLoRA": (lora, "uint8"), "QVeRA": (vera, "uint8")}
"""What is trained, and the storage of a quantized base."""
COLUMNS = {"collectives": (1, 0), "nbytes": (2**-20, 1), "parameters": (2**-20, 1)}
"""What is counted: the factor of its unit, and digits behind the point."""
HEADS = ("case", "side", "ms a step", "to stock", "collectives a step", "MiB a step", "peak MiB of parameters")


def parameter_bytes(watch: footprint.Watch, model) -> int:
    """The most bytes of parameters that this rank has had at once."""
    seen = watch.footprint()
    if seen is None:
        return sum(inventory.nbytes_of(item) for item in model.parameters())
    return seen.rest + (seen.gathered or 0)


def measure(configure, setup: Setup, folder: str, saved: str, steps: int, budget: int | None, rank: int) -> Outcome:
    """Train in one of the ranks: seconds of each step, and counts of the last."""
    from transformers import Trainer, TrainerCallback

    if budget is not None:
        os.environ["TRAINER_FSDP_PATCH_BASE_BUDGET"] = f"{budget}%"
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    given = trial.enter(setup, folder, ranks, patched=setup.name == "patched")
    given.max_steps = given.logging_steps = steps + 1
    model = configure(trial.load_base(saved, setup))
    tensors = inventory.take(model).tensors()
    found = {"seconds": []}

    class Meter(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **_):
            if state.global_step == steps:
                self.watch, self.mode = footprint.Watch(model, tensors), Count()
                self.watching = self.watch.watching()
                self.watching.__enter__()
                self.mode.__enter__()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, model, **_):
            found["seconds"].append(time.perf_counter() - self.start)
            if state.global_step > steps:
                self.mode.__exit__(None, None, None)
                self.watching.__exit__(None, None, None)
                found.update(collectives=self.mode.total, nbytes=self.mode.nbytes)
                found["parameters"] = parameter_bytes(self.watch, model)

    rows = trial.dataset((steps + 1) * trial.BATCH)
    Trainer(model=model, args=given, train_dataset=rows, callbacks=[Meter()]).train()
    found["seconds"] = found["seconds"][WARM:-1]
    return Outcome(extra=found)


def sides(storage: str, fsdp: list[int], budgets: list[int]) -> dict[tuple[int, str], tuple[Setup, int, int | None]]:
    """Set-up, ranks and budget of each side, by version of FSDP, 0 for those without, and name."""
    found = {}
    for version in fsdp:
        found[version, "stock"] = Setup("stock", fsdp=version, storage=storage), 2, None
        found[version, "patched"] = Setup("patched", fsdp=version, storage=storage), 2, None
        for budget in budgets:
            found[version, f"patched, {budget} %"] = Setup("patched", fsdp=version, storage=storage), 2, budget
    found[0, "DDP"] = Setup("DDP", fsdp=0, storage=storage), 2, None
    found[0, "floor"] = Setup("floor", fsdp=0, storage=storage, batch=trial.BATCH // 2), 1, None
    return found


def train(name: str, given, saved: str) -> dict[tuple[int, str], dict[str, object]]:
    """What every side of a method gives: medians, counts, or an error."""
    configure, storage = METHODS[name]
    spent: dict[tuple[int, str], list[float]] = {}
    found: dict[tuple[int, str], dict[str, object]] = {}
    for _ in range(given.repeat):
        for key, (setup, ranks, budget) in sides(storage, given.fsdp, given.budgets).items():
            if found.get(key, {}).get("error"):
                continue
            with tempfile.TemporaryDirectory() as folder:
                outcome = forks.launch(measure, configure, setup, folder, saved, given.steps, budget, ranks=ranks)[0]
            found[key] = {**outcome.extra, "error": outcome.error}
            spent.setdefault(key, []).extend(outcome.extra.get("seconds", ()) if not outcome.error else ())
    for key, item in found.items():
        item["seconds"] = statistics.median(spent[key]) if spent[key] else None
    return found


def rows(name: str, found: dict[tuple[int, str], dict[str, object]], fsdp: list[int]) -> list[list[str]]:
    """Lines of the table: for each version of FSDP its own sides, then those without FSDP."""
    lines = []
    for version in fsdp:
        stock = found[version, "stock"]["seconds"]
        for (own, side), item in found.items():
            if own not in (version, 0):
                continue
            if item["error"]:
                lines.append([f"{name}, FSDP{version}", side, "does not start", *["-"] * (len(HEADS) - 3)])
                continue
            ratio = f"{item['seconds'] / stock:.2f}" if stock else "-"
            counts = [f"{item[column] * unit:.{digits}f}" for column, (unit, digits) in COLUMNS.items()]
            lines.append([f"{name}, FSDP{version}", side, f"{item['seconds'] * 1e3:.0f}", ratio, *counts])
    return lines


def kept(path: Path, lines: list[list[str]]) -> list[list[str]]:
    """These lines and those of a file, which gets them all."""
    before = json.loads(path.read_text()) if path.exists() else []
    merged = {(line[0], line[1]): line for line in (*before, *lines)}
    path.write_text(json.dumps(list(merged.values()), indent=1) + "\n")
    return list(merged.values())


def draw(lines: list[list[str]], path: str) -> None:
    """Bars of the milliseconds of a step, by case and side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(line[0] for line in lines))
    names = list(dict.fromkeys(line[1] for line in lines))
    figure, axes = pyplot.subplots(figsize=(10, 4))
    for place, name in enumerate(names):
        heights = {line[0]: float(line[2]) for line in lines if line[1] == name and line[2][0].isdigit()}
        spots = [cases.index(case) + (place - len(names) / 2) * 0.8 / len(names) for case in heights]
        axes.bar(spots, list(heights.values()), 0.8 / len(names), align="edge", label=name)
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("ms a step")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--fsdp", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--budgets", type=int, nargs="*", default=[], help="percent of the base that stays gathered")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--keep", type=Path, help="lines of runs before, which those of this one replace or follow")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/measured.md")
    parser.add_argument("--counts", action="store_true", help="leave out the times, which only a quiet machine has")
    parser.add_argument("--plot", help="file of a picture")
    given = parser.parse_args()
    if given.budgets and "base_budget" not in inspect.signature(trainer_fsdp_patch.patch).parameters:
        parser.error("patch() takes no base_budget here")
    forks.TIMEOUT = 600.0
    targets.import_all()
    lines = []
    with tempfile.TemporaryDirectory() as saved:
        base(given.width).save_pretrained(saved)
        for name in given.methods:
            lines += rows(name, train(name, given, saved), given.fsdp)
    if given.keep:
        lines = kept(given.keep, lines)
    print(machine())
    shown = [[*line[:2], *line[4:]] if given.counts else line for line in (HEADS, *lines)]
    show(shown[0], shown[1:], markdown=given.markdown)
    if given.plot:
        draw(lines, given.plot)


if __name__ == "__main__":
    main()
