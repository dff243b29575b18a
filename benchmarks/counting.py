"""What the benchmarks count of each training step: collectives, the bytes that they carry, and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class Count(torch.utils._python_dispatch.TorchDispatchMode):
    """Collectives that are dispatched, and the bytes of their largest tensor argument.

    Attributes:
        total: number of collectives.
        nbytes: that they carry.
    """

    total = nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count and call."""
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in str(function):
            self.total += 1
            tensors = [item for item in torch.utils._pytree.tree_leaves(args) if isinstance(item, torch.Tensor)]
            self.nbytes += max((item.nbytes for item in tensors), default=0)
        return function(*args, **(kwargs or {}))


def meter(began: Callable[[torch.nn.Module], object] = id, ended: Callable[[torch.nn.Module], object] = id):
    """A callback for a Trainer, whose `found` gets the collectives, nbytes and seconds of each step.

    Args:
        began: is called with the model before a step, and before the clock.
        ended: is called with it after the clock.
    """
    from transformers import TrainerCallback

    class Meter(TrainerCallback):
        def __init__(self):
            self.found = {"collectives": [], "nbytes": [], "seconds": []}

        def on_step_begin(self, *_, model, **__):
            began(model)
            self.start, self.mode = time.perf_counter(), Count()
            self.mode.__enter__()

        def on_step_end(self, *_, model, **__):
            self.mode.__exit__(None, None, None)
            self.found["seconds"].append(time.perf_counter() - self.start)
            self.found["collectives"].append(self.mode.total)
            self.found["nbytes"].append(self.mode.nbytes)
            ended(model)

    return Meter()
