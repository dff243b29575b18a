"""Cost of a training step and of a save, stock beside patched, in one run on two CPU ranks.

    python benchmarks/adapter_step.py [--repeat 3] [--markdown]

Prints medians over the repetitions: collectives a step, bytes they carry, milliseconds a step, collectives of
a save. All but the milliseconds are counts, which tests/test_benchmarks.py holds docs/measured.md against.
The model is a random Llama of 12 layers, width 512; FSDP1 and FSDP2, fp32.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from trainer_fsdp_patch.testing import forks

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from counting import Count, meter
from tables import show

from trainer_fsdp_patch.testing import targets, trial
from trainer_fsdp_patch.testing.case import Outcome, Setup

STEPS = 6
SIDES = ("stock", "patched")
COLUMNS = {
    "collectives": ("collectives a step", 1, 0),
    "nbytes": ("MiB a step", 2**-20, 1),
    "seconds": ("ms a step", 1e3, 0),
    "save": ("collectives a save", 1, 0),
}
"""What is measured: its heading, the factor of its unit, and digits behind the point."""


def lora(model):
    """LoRA on all projections of the attention."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))


def vera(model):
    """VeRA on the two projections that share a shape."""
    from peft import VeraConfig, get_peft_model

    config = VeraConfig(r=64, target_modules=["q_proj", "o_proj"], projection_prng_key=1)
    return get_peft_model(model, config)


def base(width=512):
    """The benchmark's base model, of 12 layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 12, "num_attention_heads": 8}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=trial.VOCABULARY, **sizes))


def measure(configure, fsdp: int, patched: bool, folder: str, rank: int) -> Outcome:
    """Train a few steps and save, in one of two ranks."""
    from transformers import Trainer

    given = trial.enter(Setup("benchmark", fsdp=fsdp), folder, 2, patched=patched)
    given.max_steps, counted = STEPS, meter()
    trainer = Trainer(
        model=configure(base()), args=given, train_dataset=trial.dataset(STEPS * trial.BATCH), callbacks=[counted]
    )
    trainer.train()
    with Count() as saved:
        trainer.save_model(folder)
    outcome = Outcome(extra={name: values[1:] for name, values in counted.found.items()})
    outcome.extra["save"] = [saved.total]
    return outcome


def compare(configure, fsdp: int, repeat: int) -> dict[str, tuple[float, float]]:
    """Run stock and patched in turn, so that both see the same machine: medians of each number of COLUMNS.

    Raises:
        SystemExit: a run has ended with an error.
    """
    values = {side: {name: [] for name in COLUMNS} for side in SIDES}
    for _ in range(repeat):
        for side, kept in values.items():
            with tempfile.TemporaryDirectory() as folder:
                outcome = forks.launch(measure, configure, fsdp, side == "patched", str(Path(folder)), ranks=2)[0]
            if outcome.error:
                raise SystemExit(f"{configure.__name__} FSDP{fsdp} {side}: {outcome.error}")
            for name, numbers in outcome.extra.items():
                kept[name].extend(numbers)
    return {name: tuple(statistics.median(values[side][name]) for side in SIDES) for name in COLUMNS}


def row(configure, fsdp: int, medians: dict[str, tuple[float, float]]) -> list[str]:
    """A line of the table: the case, then stock, patched and their ratio in each column."""
    cells = [f"{NAMES[configure]}, FSDP{fsdp}"]
    for name, (_, unit, digits) in COLUMNS.items():
        stock, patched = medians[name]
        cells.append(f"{stock * unit:.{digits}f} -> {patched * unit:.{digits}f} ({patched / stock:.2f})")
    return cells


NAMES = {lora: "LoRA", vera: "VeRA"}
CASES = [(configure, fsdp) for fsdp in (1, 2) for configure in NAMES]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/measured.md")
    given = parser.parse_args()
    forks.TIMEOUT = 300.0
    targets.import_all()
    rows = [row(configure, fsdp, compare(configure, fsdp, given.repeat)) for configure, fsdp in CASES]
    heads = ["case", *(head for head, _, _ in COLUMNS.values())]
    title = f"12 layers, width 512, 2 gloo ranks, medians of {given.repeat} runs"
    show(heads, rows, title=title, markdown=given.markdown)


if __name__ == "__main__":
    main()
