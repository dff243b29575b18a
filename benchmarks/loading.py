"""Bytes that each rank allocates from `from_pretrained` to the first step of training, for a quantized base.

    python benchmarks/loading.py [--kinds 4bit 8bit] [--layers 16] [--ranks 2 4] [--markdown]

Stock and patched, both with what `accelerate launch` sets for `cpu_ram_efficient_loading: true`; on a CPU, accelerate
takes that for FSDP2 only, and FSDP1 is told of it later. Counted are tensors that operators allocate, on rank 0 and on
the last rank, the most at once. On a GPU the whole base of rank 0 is in main memory; its accelerator takes what the
last rank takes. The model is a random Llama of width 256 in bf16, with LoRA. `-` is a run that stops with an error.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import quantized
import quantizers  # found by way of `quantized`
import torch
from adapter_step import lora
from allocations import Allocations
from tables import show

from trainer_fsdp_patch.testing import cpu, forks, targets, trial
from trainer_fsdp_patch.testing.case import Outcome, Setup

LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
"""What `accelerate launch` sets where one rank of a machine is to load."""
KINDS = {**quantized.KINDS, "4bit, quantized before": {"storage": "uint8"}}
HEADS = ["FSDP", "ranks", "base", "quantized bytes", "rank 0, stock", "rank 0", "last rank, stock", "last rank"]


def write_base(folder: Path, layers: int) -> str:
    """Write a base model, and the same quantized in 4 bits below it."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": layers, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=trial.VOCABULARY, **sizes)).to(torch.bfloat16).save_pretrained(folder)
    four = Setup("one", fsdp=0, dtype="bfloat16", **KINDS["4bit"])
    quantizers.load(str(folder), four, AutoModelForCausalLM).save_pretrained(folder / "4bit")
    return str(folder)


def loaded(kind: str, setup: Setup, base: str):
    """The base model as a launched program loads it."""
    from transformers import AutoModelForCausalLM

    before = dict(os.environ)
    os.environ.update(LAUNCHED)
    if kind.endswith("before"):
        model = AutoModelForCausalLM.from_pretrained(f"{base}/4bit", attn_implementation="eager")
    else:
        model = quantizers.load(base, setup, AutoModelForCausalLM)
    os.environ.update({name: before.get(name, "false") for name in LAUNCHED})
    return model


def measure(kind: str, fsdp: int, ranks: int, patched: bool, base: str, folder: str, rank: int) -> Outcome:
    """Load and begin to train, in one of the ranks."""
    from transformers import Trainer, TrainerCallback

    setup = Setup("loading", fsdp=fsdp, dtype="bfloat16", ranks=ranks, ram_efficient=fsdp == 2, **KINDS[kind])
    given = trial.enter(setup, folder, ranks, patched=patched)
    given.max_steps, given.per_device_train_batch_size = 1, 2
    meter = Allocations()
    meter.__enter__()

    class Ends(TrainerCallback):
        def on_train_begin(self, *_, **__):
            meter.__exit__(None, None, None)

    base_model = loaded(kind, setup, base)
    whole = quantized.quantized_bytes(base_model) if rank == 0 else 0
    trainer = Trainer(
        model=lora(base_model), args=given, train_dataset=trial.dataset(2 * ranks, even=True), callbacks=[Ends()]
    )
    if fsdp == 1 and patched:
        cpu.hand_out(trainer.accelerator.state.fsdp_plugin)
    trainer.train()
    return Outcome(extra={"whole": whole, "peak": meter.peak})


def peaks(kind: str, fsdp: int, ranks: int, patched: bool, base: str) -> tuple[int, list[int]]:
    """Bytes of the quantized base, and the peak of the first and of the last rank, or nothing of a run that stops."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = forks.launch(measure, kind, fsdp, ranks, patched, base, folder, ranks=ranks)
    if any(outcome.error for outcome in outcomes):
        return 0, []
    return outcomes[0].extra["whole"], [outcomes[0].extra["peak"], outcomes[-1].extra["peak"]]


def row(kind: str, fsdp: int, ranks: int, base: str) -> list[str]:
    """A line of the table."""
    _, stock = peaks(kind, fsdp, ranks, False, base)
    whole, ours = peaks(kind, fsdp, ranks, True, base)
    cells = [f"{side[place]:,}" if side else "-" for place in (0, 1) for side in (stock, ours)]
    return [f"FSDP{fsdp}", str(ranks), kind, f"{whole:,}", *cells]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    able = [kind for kind in KINDS if kind not in ("hqq", "gptq")]
    parser.add_argument("--kinds", nargs="+", choices=able, default=able)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/quantized-bases.md")
    given = parser.parse_args()
    forks.TIMEOUT = 300.0
    targets.import_all()
    with tempfile.TemporaryDirectory() as folder:
        forks.launch(lambda rank: Outcome(folder=write_base(Path(folder), given.layers)), ranks=1)
        cases = [(kind, fsdp, ranks) for kind in given.kinds for fsdp in (1, 2) for ranks in given.ranks]
        rows = [row(*case, folder) for case in cases]
    title = f"{given.layers} layers, width 256; bytes at once until the first step"
    show(HEADS, rows, title=title, markdown=given.markdown)


if __name__ == "__main__":
    sys.exit(main())
