"""What base_budget costs and buys: stock beside budgets of 0 to 100 % beside DDP, in one run on two CPU ranks.

    python benchmarks/base_budget.py [--repeat 3] [--only FSDP1] [--orders] [--markdown]

Prints medians over the repetitions: collectives a step, bytes they carry, parameter bytes that a rank holds between
steps, and milliseconds a step with their ratio to stock. All but the milliseconds are counts, which
tests/test_benchmarks.py holds docs/base-budget.md against. `--orders` compares which half of the layers to keep: the
first, the last, or every other one. The model is a random Llama of 12 layers, width 512; fp32, the same adapter in all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from adapter_step import NAMES, base
from counting import meter
from tables import show

from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.measuring import footprint
from trainer_fsdp_patch.planning import residence
from trainer_fsdp_patch.testing import forks, targets, trial
from trainer_fsdp_patch.testing.case import Outcome, Setup

STEPS = 6
SIDES = ("stock", "0%", "25%", "50%", "100%", "DDP")
ORDERS = {
    "even": residence.spread,
    "first": lambda count, kept: list(range(kept)),
    "last": lambda count, kept: list(range(count - kept, count)),
}
"""Which layers are kept: from the number of all and of these to their places."""
COLUMNS = {
    "collectives": ("collectives a step", 1, 0),
    "nbytes": ("MiB a step", 2**-20, 1),
    "rest": ("MiB at rest", 2**-20, 1),
    "seconds": ("ms a step", 1e3, 0),
}
"""What is measured: its heading, the factor of its unit, and digits behind the point."""


def measure(configure, fsdp: int, side: str, folder: str, rank: int) -> Outcome:
    """Train a few steps in one of two ranks.

    Args:
        configure: puts the adapter on.
        fsdp: version of FSDP, where the side is not DDP.
        side: one of SIDES, or a name of ORDERS at half of the base.
        folder: for the Trainer.
        rank: of this process.
    """
    from transformers import Trainer

    residence.spread = ORDERS.get(side, residence.spread)
    budget = "50%" if side in ORDERS else side if "%" in side else ""
    setup = Setup("benchmark", fsdp=0 if side == "DDP" else fsdp, budget=budget)
    given = trial.enter(setup, folder, 2, patched=bool(budget))
    given.max_steps = STEPS
    rest: list[int] = []
    model = configure(base())
    tensors = inventory.take(model).tensors()

    def weigh(model) -> None:
        taken = footprint.Watch(model, tensors).footprint() if side != "DDP" else None
        rest.append(taken.rest if taken else sum(item.nbytes for item in model.parameters()))

    rows, counted = trial.dataset(STEPS * trial.BATCH), meter(ended=weigh)
    Trainer(model=model, args=given, train_dataset=rows, callbacks=[counted]).train()
    found = {**counted.found, "rest": rest}
    return Outcome(extra={name: values[1:] for name, values in found.items()})


def compare(configure, fsdp: int, repeat: int, sides=SIDES) -> dict[str, dict[str, float]]:
    """Run all sides in turn, so that they see the same machine: medians of each number of COLUMNS by side.

    Raises:
        SystemExit: a run has ended with an error.
    """
    values = {side: {name: [] for name in COLUMNS} for side in sides}
    for _ in range(repeat):
        for side, kept in values.items():
            with tempfile.TemporaryDirectory() as folder:
                outcome = forks.launch(measure, configure, fsdp, side, folder, ranks=2)[0]
            if outcome.error:
                raise SystemExit(f"{configure.__name__} FSDP{fsdp} {side}: {outcome.error}")
            for name, numbers in outcome.extra.items():
                kept[name].extend(numbers)
    return {side: {name: statistics.median(kept[name]) for name in COLUMNS} for side, kept in values.items()}


def rows(configure, fsdp: int, medians: dict[str, dict[str, float]]) -> list[list[str]]:
    """Lines of the table, one for each side; milliseconds with their ratio to the first side."""
    first = next(iter(medians.values()))
    lines = []
    for side, found in medians.items():
        cells = [f"{NAMES[configure]}, FSDP{fsdp}", side]
        cells += [f"{found[name] * unit:.{digits}f}" for name, (_, unit, digits) in COLUMNS.items()]
        lines.append([*cells[:-1], f"{cells[-1]} ({found['seconds'] / first['seconds']:.2f})"])
    return lines


CASES = [(configure, fsdp) for configure in NAMES for fsdp in (1, 2)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default="", help="keep cases whose name contains this, such as 'LoRA, FSDP2'")
    parser.add_argument("--orders", action="store_true", help="compare the orders of layers at half of the base")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/base-budget.md")
    given = parser.parse_args()
    forks.TIMEOUT = 300.0
    targets.import_all()
    sides = tuple(ORDERS) if given.orders else SIDES
    lines = []
    for configure, fsdp in CASES:
        if given.only in f"{NAMES[configure]}, FSDP{fsdp}":
            lines += rows(configure, fsdp, compare(configure, fsdp, given.repeat, sides))
    heads = ["case", "base_budget", *(head for head, _, _ in COLUMNS.values())]
    title = f"12 layers, width 512, 2 gloo ranks, medians of {given.repeat} runs"
    show(heads, lines, title=title, markdown=given.markdown)


if __name__ == "__main__":
    main()
