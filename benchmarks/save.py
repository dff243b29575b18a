"""Cost of a save, stock beside patched, and what of it is proof, in one run on two CPU ranks.

    python benchmarks/save.py [--repeat 5] [--width 512] [--rank 128]

Prints medians on rank 0: milliseconds of a resume checkpoint (adapter file, model part, optimizer, scheduler, random
state), and of the parts that the patches add to it. The model is `adapter_step.py`'s of some width, with LoRA on all
projections, FSDP2, fp32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict

import adapter_step
from tables import show

from trainer_fsdp_patch.ranks import collectives
from trainer_fsdp_patch.saving import adapter_state, liveness, writing
from trainer_fsdp_patch.testing import forks, targets, trial
from trainer_fsdp_patch.testing.case import Outcome, Setup

PARTS = {
    "ranks compared": (collectives, "compare"),
    "values finite": (adapter_state, "refuse_dead"),
    "moved since the start": (liveness.Liveness, "warn_unmoved"),
    "keys as expected": (adapter_state, "prove"),
    "file read back": (writing, "equal"),
    "bytes on the disk": (writing, "_settle"),
    "all ranks told": (writing, "_agree"),
}


def lora(model, rank):
    """LoRA on all projections of a layer."""
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=rank, target_modules=names))


def timed(spent, name, function):
    """The function, with its seconds added to `spent[name]`."""

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - start

    return wrapper


def measure(patched: bool, repeat: int, width: int, lora_rank: int, folder: str, rank: int) -> Outcome:
    """Train a step and write checkpoints, in one of two ranks."""
    from transformers import Trainer

    given = trial.enter(Setup("benchmark"), folder, 2, patched=patched)
    given.max_steps = 1
    spent = defaultdict(float)
    for name, (owner, function) in PARTS.items():
        setattr(owner, function, timed(spent, name, getattr(owner, function)))
    model = lora(adapter_step.base(width), lora_rank)
    trainer = Trainer(model=model, args=given, train_dataset=trial.dataset(trial.BATCH))
    trainer.train()
    rows = []
    for _ in range(repeat):
        spent.clear()
        trainer.accelerator.wait_for_everyone()
        start = time.perf_counter()
        trainer._save_checkpoint(trainer.model, trial=None)
        rows.append({"checkpoint": time.perf_counter() - start, **spent})
    sizes = [0, 0]
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    return Outcome(extra={"rows": rows[1:], "sizes": sizes})


def main() -> None:
    """Run both sides in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rank", type=int, default=128)
    given = parser.parse_args()
    repeat = given.repeat + 1
    forks.TIMEOUT = 300.0
    targets.import_all()
    medians = {}
    for patched in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            outcome = forks.launch(measure, patched, repeat, given.width, given.rank, folder, ranks=2)[0]
        if outcome.error:
            raise SystemExit(outcome.error)
        names = {name: None for row in outcome.extra["rows"] for name in row}
        medians[patched] = {
            name: statistics.median(row.get(name, 0.0) for row in outcome.extra["rows"]) * 1e3 for name in names
        }
    frozen, trained = (size / 1e6 for size in outcome.extra["sizes"])
    title = f"medians of {repeat - 1} checkpoints, 2 gloo ranks; millions of parameters: {trained:.1f} of {frozen:.0f}"
    stock, whole = medians[False]["checkpoint"], medians[True]["checkpoint"]
    parts = {name: medians[True].get(name, 0.0) for name in PARTS}
    rows = [("checkpoint, stock -> patched", f"{stock:.0f} -> {whole:.0f}", f"{whole / stock:.1%}", "")]
    for name, value in {**parts, "all of these": sum(parts.values())}.items():
        rows.append((name, f"{value:.1f}", f"{value / stock:.2%}", f"{value / whole:.1%}"))
    show(("part", "ms", "of stock's", "of the patched"), rows, title=title)


if __name__ == "__main__":
    main()
