"""Messages and bytes of start-up, a step and a save, for 2, 64 and 1,024 ranks.

    python benchmarks/scale.py [--layers 80] [--markdown] [--plot]

One process plays rank 0 of as many ranks: torch's fake process group takes every collective and sends nothing. The
model has the shape of Llama-3 70B, with LoRA on all linear layers. Its base stays on meta, and the adapter is real.
Counted are what this package sends itself: the collectives that are dispatched, and the bytes that a rank gets by them.
The collectives of FSDP are not.

Agreement is all that is no tensor of the adapter. Next to it stands what it took when whole inventories were gathered:
their pickled bytes from each rank, and 16 or 24 bytes for each tensor twice. `--plot` draws tests/data/scale.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
from tables import show
from torch.utils._python_dispatch import TorchDispatchMode

from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.loading import base_weights
from trainer_fsdp_patch.planning.plan import make_plan
from trainer_fsdp_patch.planning.prepared import Prepared
from trainer_fsdp_patch.preparing import prepare
from trainer_fsdp_patch.ranks import agreement
from trainer_fsdp_patch.saving import adapter_state, writing
from trainer_fsdp_patch.training import steps

RANKS = (2, 64, 1024)
PHASES = ("start-up", "step", "save")
PICTURE = Path(__file__).parent.parent / "tests" / "data" / "scale.png"
COLUMNS = ("phase", "ranks", "messages", "MB of the adapter", "bytes of agreement", "bytes when gathered")


class Count(TorchDispatchMode):
    """Collectives, and the bytes that a rank gets by them: those of words and texts apart from those of tensors."""

    def __init__(self):
        super().__init__()
        self.messages = self.agreed = self.tensors = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count and call."""
        if function.namespace == "c10d":
            self.messages += 1
            # Of an input and an output the larger one is counted: what a gather gives is as large as all inputs.
            parts = [[item for item in torch.utils._pytree.tree_leaves(arg) if hasattr(item, "nbytes")] for arg in args]
            nbytes = max(sum(item.nbytes for item in part) for part in parts)
            if any(item.is_floating_point() for part in parts for item in part):
                self.tensors += nbytes
            else:
                self.agreed += nbytes
        return function(*args, **(kwargs or {}))


class Accelerator(SimpleNamespace):
    """What is asked of accelerate's. Weak references refer to it, which a plain namespace does not allow."""


class Gathered:
    """What the same questions took when all ranks gathered everything: the bytes that a rank got."""

    def __init__(self, ranks):
        self.ranks, self.nbytes = ranks, 0
        self.first_difference, self.differing_rows = agreement.first_difference, agreement.differing_rows

    def __enter__(self):
        def first_difference(groups, *args):
            # The adapter's make-up was gathered; of the base's tensors a checksum was.
            value = 2**32 - 1 if args[-1] == base_weights._COMPARISON else {k: v for g in groups for k, v in g.items()}
            self.nbytes += self.ranks * (8 + len(pickle.dumps(value)))
            return self.first_difference(groups, *args)

        def differing_rows(table, *args):
            self.nbytes += 2 * table.nbytes
            return self.differing_rows(table, *args)

        agreement.first_difference, agreement.differing_rows = first_difference, differing_rows
        return self

    def __exit__(self, *_):
        agreement.first_difference, agreement.differing_rows = self.first_difference, self.differing_rows


def planning():
    """The benchmark that builds the shapes."""
    spec = importlib.util.spec_from_file_location("planning", Path(__file__).parent / "planning.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def phases(model, ranks):
    """What each phase does, in order, for a model on meta whose process group there is.

    Args:
        model: with an adapter.
        ranks: in the process group.
    """
    plugin = SimpleNamespace(cpu_ram_efficient_loading=False, sync_module_states=False)
    accelerator = Accelerator(
        mixed_precision="no",
        device=torch.device("cpu"),
        num_processes=ranks,
        # Which would write the embeddings, and these are on meta.
        is_main_process=False,
        state=SimpleNamespace(fsdp_plugin=plugin),
    )
    taken = inventory.take(model)
    prepared = Prepared(model, make_plan(model, inventory=taken), [None], taken)

    def save():
        adapter_state._adapter(accelerator, model, prepared)
        writing._agree(None, accelerator.device)

    yield "start-up", lambda: prepare.settle(accelerator, prepared, taken)
    for tensor in prepared.tensors:
        # Room on the device was not filled.
        tensor.detach().zero_()
        tensor.grad = torch.zeros_like(tensor) if tensor.requires_grad else None
    yield "step", lambda: steps.average_replicated(prepared)
    yield "save", save


def measure(ranks, layers):
    """Lines of the table for a number of ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = planning().build("Llama-3 70B, LoRA", layers)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    rows = []
    try:
        for phase, act in phases(model, ranks):
            with warnings.catch_warnings(), Gathered(ranks) as before, Count() as count:
                warnings.simplefilter("ignore")
                act()
            # Whether somebody has failed is eight bytes, then as now.
            gathered = before.nbytes + (8 if phase == "save" else 0)
            rows.append((phase, ranks, count.messages, count.tensors, count.agreed, gathered))
    finally:
        dist.destroy_process_group()
    return rows


def cells(row):
    """A line as it is printed."""
    phase, ranks, messages, tensors, agreed, gathered = row
    return [phase, f"{ranks:,}", str(messages), f"{tensors / 1e6:.1f}", f"{agreed:,}", f"{gathered:,}"]


def plot(rows):
    """Draw the bytes of agreement of start-up by number of ranks."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    started = [row for row in rows if row[0] == "start-up"]
    ranks = [row[1] for row in started]
    for place, label, style in ((5, "inventories gathered", "o--"), (4, "digests compared", "o-")):
        values = [row[place] for row in started]
        axes.plot(ranks, values, style, label=label)
        for rank, value in zip(ranks, values, strict=True):
            axes.annotate(f"{value:,}", (rank, value), textcoords="offset points", xytext=(0, 6), ha="center")
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="bytes that each rank gets at start-up")
    axes.set(ylim=(30, 3e9), xlim=(1.2, 2500), title="Agreement of ranks: Llama-3 70B, LoRA on all linear layers")
    axes.set_xticks(ranks, [f"{rank:,}" for rank in ranks])
    axes.legend(loc="center right")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/measured.md")
    parser.add_argument("--plot", action="store_true", help="draw tests/data/scale.png")
    given = parser.parse_args()
    measured = [row for ranks in RANKS for row in measure(ranks, given.layers)]
    measured.sort(key=lambda row: PHASES.index(row[0]))
    show(COLUMNS, map(cells, measured), markdown=given.markdown)
    if given.plot:
        plot(measured)


if __name__ == "__main__":
    main()
