"""What the patches themselves do in each step, by the number of an adapter's tensors.

    python benchmarks/hot_path.py [--tensors 100 500 2000] [--steps 100] [--most 1.0] [--markdown]

One process stands for two ranks: torch's fake process group answers collectives at once, so none is measured. A model's
forward does next to nothing with its tensors. It takes steps in turn with the hooks of a planned model and without
them. What counts is the difference in processor time between the lower quartiles of both, for other programs only add
to a time. Time in torch's own kernels, which copy the gradients, is apart: `python` is what is left. A profile of
further steps says which functions it is. Then the wrapper around each unit of FSDP1 is timed. Ends with 1 where
`python` is above `--most` milliseconds.
"""

from __future__ import annotations

import argparse
import collections
import cProfile
import gc
import os
import pstats
import statistics
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from tables import show
from torch.optim import optimizer as optimizers

import trainer_fsdp_patch
from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.planning.prepared import Prepared, keep
from trainer_fsdp_patch.shadowing import shadowed
from trainer_fsdp_patch.testing import targets
from trainer_fsdp_patch.training import releasing, steps

FIRST = 5
"""Steps that are not counted."""

PACKAGE = str(Path(trainer_fsdp_patch.__file__).parent)
KERNELS = {torch: ("_foreach_copy_", "_foreach_norm", "cat"), torch.linalg: ("vector_norm",)}
"""Functions of torch that go through the elements of gradients."""


class Sum(torch.autograd.Function):
    """A sum over tensors in one call, which does not take long."""

    @staticmethod
    def forward(context, *tensors):
        context.save_for_backward(*tensors)
        return torch.zeros(())

    @staticmethod
    def backward(context, gradient):
        return tuple(torch.ones_like(tensor) for tensor in context.saved_tensors)


class Linears(torch.nn.Module):
    """Many linear layers, as a base model whose forward is a sum over what is trained."""

    def __init__(self, count):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(count))
        self.trained = []

    def forward(self):
        return Sum.apply(*self.trained)


class Nothing(torch.optim.Optimizer):
    """An optimizer whose step does nothing, but for the hooks around it."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1.0})

    def step(self):
        pass


class Owner:
    """What the hooks ask of an Accelerator."""

    sync_gradients, mixed_precision = True, "no"

    def __init__(self, model):
        self._models = [model]


def made(count: int):
    """A model with that many adapter tensors, and an optimizer of them."""
    from peft import LoraConfig, get_peft_model

    base = Linears(count // 2)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=r"layers\.\d+"))
    base.trained = [item for item in model.parameters() if item.requires_grad]
    assert len(base.trained) == count
    return model, Nothing(base.trained)


def step(model, optimizer) -> None:
    """Forward, backward and the optimizer's step, and gradients set to None as the Trainer does."""
    model().backward()
    optimizer.step()
    model.zero_grad()


class Clock:
    """Time in torch's KERNELS from `start` on.

    Attributes:
        total: seconds so far.
    """

    def __init__(self):
        self.total = 0.0

    def start(self) -> None:
        """Time the functions for as long as this process lives."""
        for owner, names in KERNELS.items():
            for name in names:
                setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function):
        def call(*args, **kwargs):
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.total += time.thread_time() - start

        return call

    def taken(self) -> float:
        """The sum, which begins again."""
        total, self.total = self.total, 0.0
        return total


def seconds(work) -> float:
    """Processor time of a call in this thread."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def planned(model) -> Owner:
    """Watch a model from now on, as the Trainer's preparation does."""
    taken = inventory.take(model)
    owner = Owner(model)
    prepared = Prepared(model, trainer_fsdp_patch.plan(model), [None], taken)
    steps.watch(prepared, owner)
    keep(model, prepared)
    return owner


def split(model, optimizer, count: int) -> dict[str, float]:
    """Milliseconds a step by function of ours, with what it calls of torch, under a profiler, which slows Python."""
    with cProfile.Profile() as profile:
        for _ in range(count):
            step(model, optimizer)
    ours = collections.Counter()
    for (file, _, name), (_, _, own, _, callers) in pstats.Stats(profile).stats.items():
        if file.startswith(PACKAGE):
            ours[f"{Path(file).stem}.{name}"] += own
        for caller in callers:
            if caller[0].startswith(PACKAGE) and not file.startswith(PACKAGE):
                ours[f"{Path(caller[0]).stem}.{caller[2]}"] += callers[caller][3]
    return {name: spent / count * 1e3 for name, spent in ours.most_common()}


def measure(count: int, repeat: int, clock: Clock) -> tuple[float, float, dict[str, float]]:
    """Milliseconds a step of all that is ours, of torch's kernels in it, and of each function under a profiler."""
    (bare, theirs), (model, optimizer) = made(count), made(count)
    owner = planned(model)
    # As FSDP1's root has it: else the hooks would look for a unit of FSDP.
    vars(model)["_sync_gradients"] = True
    stock, ours, inside = [], [], []
    # Python's own collections come in any step, and take as long as many.
    gc.collect()
    gc.disable()
    for _ in range(FIRST + repeat):
        with shadowed(optimizers, _global_optimizer_pre_hooks=collections.OrderedDict()):
            stock.append(seconds(lambda: step(bare, theirs)))
        clock.taken()
        ours.append(seconds(lambda: step(model, optimizer)))
        inside.append(clock.taken())
    gc.enable()
    functions = split(model, optimizer, repeat)
    del owner
    before, after, within = (statistics.quantiles(item[FIRST:], n=4)[0] * 1e3 for item in (stock, ours, inside))
    return after - before, within, functions


def unit() -> float:
    """Microseconds for one unit of FSDP1: inputs of its own, as a decoder layer gets them."""
    states = torch.zeros(1, 2, 4, requires_grad=True)
    flat = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    handle = type("Handle", (), {"flat_param": flat})()
    named = {"attention_mask": None, "position_ids": flat, "past_key_values": None, "use_cache": False,
             "position_embeddings": (flat, flat), "cache_position": flat}  # fmt: skip
    return statistics.median(seconds(lambda: releasing.own_inputs(handle, (states,), named)) for _ in range(500)) * 1e6


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, nargs="+", default=[100, 500, 2000])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--most", type=float, default=1.0, help="milliseconds of Python a step (1.0)")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/measured.md")
    given = parser.parse_args()
    targets.import_all()
    torch.set_num_threads(1)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    clock = Clock()
    clock.start()
    heads = ["adapter tensors", "ms a step", "torch's kernels", "python"]
    rows, worst = [], 0.0
    for count in given.tensors:
        total, inside, functions = measure(count, given.steps, clock)
        rows.append([str(count), *(f"{value:.2f}" for value in (total, inside, total - inside))])
        worst = max(worst, total - inside)
    show(heads, rows, markdown=given.markdown)
    if not given.markdown:
        print(f"by function at {given.tensors[-1]} tensors, under a profiler, ms a step:")
        for name, spent in list(functions.items())[:12]:
            print(f"  {name:40} {spent:.3f}")
        print(f"inputs of one unit of FSDP1: {unit():.1f} us")
    return int(worst > given.most)


if __name__ == "__main__":
    sys.exit(main())
