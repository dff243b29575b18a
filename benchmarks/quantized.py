"""What a quantized base takes of each rank: bytes at rest, gathered at once, and per step, and the time of a step.

    python benchmarks/quantized.py [--repeat 3] [--markdown] [--ranks 1 2 3 4]

Stock where it runs, replicated as it is without the patches for packed units, and sharded, in one run on CPU ranks.
All but the milliseconds are counts. The model is a random Llama of 4 layers, width 256, in bf16, with LoRA.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from adapter_step import lora
from counting import meter
from tables import show

from trainer_fsdp_patch.inspecting import inventory, leaves
from trainer_fsdp_patch.measuring import footprint
from trainer_fsdp_patch.packing import choosing
from trainer_fsdp_patch.patching import registry
from trainer_fsdp_patch.testing import forks, targets, trial
from trainer_fsdp_patch.testing.case import Outcome, Setup

# As a program it finds what tests find by pytest's own path.
sys.path.extend(str(Path(__file__).parent.parent / "tests" / name) for name in ("matrix", "helpers"))

import quantizers

STEPS = 4
WAYS = ("stock", "replicated", "sharded")
KINDS = {
    "4bit": {"storage": "uint8"},
    "4bit double": {"storage": "uint8", "kind": "nf4 double"},
    "8bit": {"storage": "8bit"},
    "hqq": {"quantizer": "hqq"},
    "torchao int8": {"quantizer": "torchao-int8"},
    "quanto int8": {"quantizer": "quanto-int8"},
    "gptq": {"quantizer": "gptq"},
    "aqlm": {"quantizer": "aqlm"},
}
"""Bases with what a user asks for, and the default of everything else."""

PATCHES = "torch_v2_2_packed_units,torch_v2_6_packed_groups"


def write_base(folder: Path) -> str:
    """Write the benchmark's base model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=trial.VOCABULARY, **sizes)).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def quantized_bytes(model) -> int:
    """Bytes of everything that the quantized layers of a loaded base keep, each storage once."""
    layers = choosing.quantized_layers(inventory.take(model)).values()
    ranges = {leaves.span(leaf.tensor) for layer in layers for leaf in leaves.leaves(layer)}
    return sum(end - start for _, start, end in ranges)


def measure(kind: str, fsdp: int, ranks: int, way: str, base: str, folder: str, rank: int) -> Outcome:
    """Train a few steps with LoRA, in one of the ranks."""
    from transformers import AutoModelForCausalLM, Trainer

    if way == "replicated":
        os.environ[registry.DISABLE] = PATCHES
    setup = Setup("benchmark", fsdp=fsdp, dtype="bfloat16", ranks=ranks, batch=2 * ranks, **KINDS[kind])
    given = trial.enter(setup, folder, max(ranks, 2) if fsdp else 1, patched=way != "stock")
    given.max_steps, given.per_device_train_batch_size = STEPS, 2
    model = quantizers.load(base, setup, AutoModelForCausalLM)
    whole = quantized_bytes(model)
    model = lora(model)
    tensors = inventory.take(model).tensors()
    watched, watching = [], contextlib.ExitStack()

    def began(model) -> None:
        watched.append(footprint.Watch(model, tensors))
        watching.enter_context(watched[-1].watching())

    counted = meter(began, lambda model: watching.close())
    rows = trial.dataset(STEPS * 2 * ranks, even=True)
    Trainer(model=model, args=given, train_dataset=rows, callbacks=[counted]).train()
    last = watched[-1].footprint()
    numbers = {"quantized": whole, "base": last.base + last.statistics, "gathered": last.gathered}
    numbers["full"] = last.replicated + last.statistics
    return Outcome(extra={**{name: values[1:] for name, values in counted.found.items()}, **numbers})


def run(kind: str, fsdp: int, ranks: int, way: str, base: str) -> Outcome:
    """What rank 0 has measured."""
    with tempfile.TemporaryDirectory() as folder:
        return forks.launch(measure, kind, fsdp, ranks, way, base, folder, ranks=ranks)[0]


def row(kind: str, fsdp: int, ranks: int, base: str, repeat: int) -> list[str]:
    """A line of the table: bytes of a rank and of a step, and milliseconds, by way."""
    outcomes = {way: [] for way in WAYS}
    for _ in range(repeat):
        for way in WAYS:
            outcomes[way].append(run(kind, fsdp, ranks, way, base))
    cells = [kind, f"FSDP{fsdp}", str(ranks)]
    cells.append(next((f"{outcomes[way][0].extra['quantized']:,}" for way in WAYS if not outcomes[way][0].error), ""))
    for name in ("base", "gathered", "nbytes", "seconds"):
        cells.append(" / ".join(_number(name, outcomes[way]) for way in WAYS))
    return cells


def _number(name: str, outcomes: list[Outcome]) -> str:
    if any(outcome.error for outcome in outcomes):
        return "-"
    values = [outcome.extra[name] for outcome in outcomes]
    if name in ("base", "gathered"):
        return f"{values[0]:,}"
    middle = statistics.median([number for some in values for number in some])
    return f"{middle * 1e3:.0f}" if name == "seconds" else f"{middle:,.0f}"


HEADS = [
    "base",
    "FSDP",
    "ranks",
    "quantized bytes",
    "bytes of the base at rest",
    "gathered at once",
    "bytes a step",
    "ms a step",
]


def main() -> None:
    """Print the table: stock / replicated / sharded in each column."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/quantized-bases.md")
    given = parser.parse_args()
    forks.TIMEOUT = 300.0
    targets.import_all()
    with tempfile.TemporaryDirectory() as folder:
        forks.launch(lambda rank: Outcome(folder=write_base(Path(folder))), ranks=1)
        cases = [(kind, fsdp, ranks) for kind in KINDS for fsdp in (1, 2) for ranks in given.ranks]
        rows = [row(*case, folder, given.repeat) for case in cases]
    show(HEADS, rows, title="4 layers, width 256; stock / replicated / sharded", markdown=given.markdown)


if __name__ == "__main__":
    main()
