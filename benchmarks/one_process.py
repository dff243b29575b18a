"""What patch() costs a training step in one process, where it repairs nothing.

    python benchmarks/one_process.py [--rounds 10] [--steps 150] [--most 0.1]

Two processes train a tiny LoRA model, one stock and one patched. They take steps in turn on one core, so that each pair
of steps sees the same machine. A round gives the median difference of its pairs; each has new processes, and the other
side begins. Prints median and quartiles of the rounds, beside those of two stock trainings: what the machine itself
adds. What counts is processor time, which other programs disturb least. Ends with 1 where the difference is above
`--most` milliseconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from tables import show

import trainer_fsdp_patch
from trainer_fsdp_patch.testing import targets, trial
from trainer_fsdp_patch.testing.case import Setup

FIRST = 5
"""Steps of a training that are not counted: caches are filled in them."""

WAIT = 60.0
"""Seconds after which a training that gets no turn gives up."""


def model():
    """A random Llama of one layer with LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=trial.VOCABULARY, **sizes))
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def train(steps, patched, mine, other, sender):
    """Train in this process, and hand over after each step.

    Args:
        steps: number of those that count.
        patched: whether `patch()` is called first.
        mine: semaphore that gives this process its turn.
        other: the other process's.
        sender: end of a pipe, which gets the seconds of each step.
    """
    from transformers import Trainer, TrainerCallback

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    spent = []

    def wait():
        if not mine.acquire(timeout=WAIT):
            raise TimeoutError("the other training does not hand over")

    class Clock(TrainerCallback):
        start = 0.0

        def on_step_end(self, *_, **__):
            # A step lasts from the end of the one before to its own, but for the other side's.
            spent.append(time.process_time() - self.start)
            other.release()
            wait()
            self.start = time.process_time()

    wait()
    if patched:
        trainer_fsdp_patch.patch(strict=True)
    with tempfile.TemporaryDirectory() as folder:
        given = trial.arguments(Setup("one process"), folder, 1)
        given.max_steps, given.logging_steps = FIRST + steps, FIRST + steps
        rows = trial.dataset(given.max_steps * trial.BATCH)
        Trainer(model=model(), args=given, train_dataset=rows, callbacks=[Clock()]).train()
    sender.send(spent[FIRST:])
    other.release()


def race(steps: int, *sides: bool) -> list[list[float]]:
    """Seconds of the steps of two trainings, stock or patched, of which the first begins."""
    context = multiprocessing.get_context("fork")
    turns = [context.Semaphore(1), context.Semaphore(0)]
    pipes = [context.Pipe(duplex=False) for _ in sides]
    processes = [
        context.Process(target=train, args=(steps, patched, turns[place], turns[1 - place], pipes[place][1]))
        for place, patched in enumerate(sides)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        # Else a process that dies leaves the reading end waiting.
        sender.close()
    spent = [receiver.recv() for receiver, _ in pipes]
    for process in processes:
        process.join()
    return spent


def measure(rounds: int, steps: int) -> dict[str, list[float]]:
    """Milliseconds of a stock step, and the median difference of each round."""
    found: dict[str, list[float]] = {"stock": [], "patched - stock": [], "stock - stock": []}
    for turn in range(rounds):
        for name in ("patched - stock", "stock - stock"):
            sides = (False, name.startswith("patched"))
            one, other = race(steps, *sides) if turn % 2 else race(steps, *sides[::-1])[::-1]
            found["stock"].append(statistics.median(one) * 1e3)
            found[name].append(statistics.median(map(float.__sub__, other, one)) * 1e3)
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--most", type=float, default=0.1, help="milliseconds a step (0.1)")
    given = parser.parse_args()
    targets.import_all()
    found = measure(given.rounds, given.steps)
    rows = [(name, *(f"{value:.3f}" for value in statistics.quantiles(values, n=4))) for name, values in found.items()]
    title = f"one process, LoRA, {given.rounds} rounds of {given.steps} steps"
    show(("ms/step", "lower quartile", "median", "upper quartile"), rows, title=title)
    return int(statistics.median(found["patched - stock"]) > given.most)


if __name__ == "__main__":
    sys.exit(main())
