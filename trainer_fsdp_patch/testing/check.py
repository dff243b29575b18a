"""`python -m trainer_fsdp_patch check`: trains VeRA on two ranks, stock and patched, next to one process."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_fsdp_patch.measuring.footprint import Footprint
from trainer_fsdp_patch.testing import beyond, case, forks, trial
from trainer_fsdp_patch.testing.case import Setup

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

SETUPS = (
    Setup("FSDP1, fp32", fsdp=1),
    Setup("FSDP1, use_orig_params false", fsdp=1, use_orig_params=False),
    Setup("FSDP1, bf16 mixed precision", fsdp=1, amp="bf16"),
    Setup("FSDP2, fp32", fsdp=2),
    Setup("FSDP2, bf16 mixed precision", fsdp=2, amp="bf16"),
    Setup("FSDP2, RAM-efficient loading", fsdp=2, ram_efficient=True),
)


def vera(model: PreTrainedModel) -> PeftModel:
    """The adapter that this project began with: two shared projections, two vectors a layer."""
    from peft import VeraConfig, get_peft_model

    config = VeraConfig(r=8, target_modules=["q_proj", "o_proj"], projection_prng_key=1, d_initial=0.1)
    return get_peft_model(model, config)


def ranks() -> int:
    """One nccl rank for each GPU where there are two or more, else two gloo ranks on the CPU."""
    import torch

    return max(2, torch.cuda.device_count())


def run() -> int:
    """Run every set-up stock and patched, print the table, and return 0 only if every patched cell is right.

    A patched cell has to equal one process. It may take no more of a rank than its plan says and than stock does.
    """
    from rich.console import Console
    from rich.table import Table

    os.environ["OMP_NUM_THREADS"] = "1"
    # Asks NVML for the GPUs: the CUDA runtime in the parent would be of no use to the forked ranks.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import_targets()
    # Each rank gets a sample at least, and one process the same global batch.
    trial.BATCH = trial.BATCH if trial.BATCH % ranks() == 0 else ranks()
    table = Table(title=f"VeRA on {ranks()} ranks next to one process", title_justify="left")
    for column in ("set-up", "stock", "patched", "relative error", "units", "bytes gathered at once"):
        table.add_column(column, overflow="fold")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        base = str(forks.launch(_base, f"{folder}/base", ranks=1)[0].folder)
        for setup in SETUPS:
            where = Path(folder) / setup.name.replace(" ", "_")
            one = trial.run(setup, vera, base, where / "one", ranks=1, patched=False)
            runs = [
                trial.run(setup, vera, base, where / side, ranks=ranks(), patched=side == "patched")
                for side in ("stock", "patched")
            ]
            stock, patched = (case.compare(outcome, one, setup) for outcome in runs)
            took = [outcome.footprint for outcome in runs]
            more = beyond.fault(took[1], None, took[0]) if took[1] else ""
            wrong += bool(patched.error or more)
            said = (stock.error or "right", patched.error or more or "right", f"{patched.worst:.1e}")
            table.add_row(setup.name, *said, _both(took, "units"), _both(took, "gathered"))
    Console(width=None if Console().is_terminal else 140).print(table)
    return int(wrong > 0)


def _both(took: list[Footprint | None], name: str) -> str:
    """A number of stock's and of the patched run; a run that ends before its first step has none."""
    return " -> ".join("none" if item is None else str(getattr(item, name)) for item in took)


def _base(folder: str, rank: int) -> case.Outcome:
    return case.Outcome(folder=trial.tiny_base(Path(folder)))


def import_targets() -> None:
    """Import once what every forked rank needs; the parent computes nothing, so that it can be forked."""
    import torch

    from trainer_fsdp_patch.patching import registry

    targets = {item.target for item in registry.discover().values() if item.concerns()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("peft", "transformers.trainer", "transformers.models.llama.modeling_llama", *sorted(targets)):
            importlib.import_module(name)
    with contextlib.suppress(ImportError):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        # A table of thousands of expressions, which each rank would compile as it loads its first model.
        get_checkpoint_conversion_mapping("llama")
    torch.set_num_threads(1)
