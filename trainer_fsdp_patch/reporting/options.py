"""The command line of `plan`: its arguments, its help, and what is refused before anything is imported."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from trainer_fsdp_patch.commands.parsing import describe
from trainer_fsdp_patch.errors import PlanError
from trainer_fsdp_patch.planning import residence

HELP = "what a run will take of each rank, and what fits its memory, from configurations alone"

NOTHING_FITS = 3
"""Exit code where `--memory` has room for nothing that was tried."""

ABOUT = """Says what each rank will hold of a model with an adapter, what a step gathers, and why.
It reads configurations, not weights. Activations come from a forward and a backward pass without data.
With --memory it looks for what fits, and prints the lines for TrainingArguments and for accelerate.
"""
CODES = """0    the plan, and with --memory something that fits
2    it could not plan: an argument, a file, a missing package
3    nothing that was tried fits --memory; it says how much is missing"""
EXAMPLE = """plan meta-llama/Llama-3.1-70B --peft lora --ranks 8 --mixed-precision bf16
plan path/to/model --peft path/to/adapter --fsdp accelerate.yaml --memory 24GiB --html plan.html"""

DTYPES = ("fp32", "bf16", "fp16")
PRECISIONS = ("no", "bf16", "fp16")
QUANTIZERS = ("4bit", "8bit")


@dataclass(frozen=True)
class Asked:
    """What `plan` was asked for.

    Attributes:
        model: folder, file or name of the base's configuration.
        peft: file of the adapter's, or a method.
        fsdp: 1, 2 or a file, or None for the newest that the installed releases have.
        ranks: number of ranks, or None for what the file says.
        memory: bytes of a rank's device, or None.
        rows: of a rank's micro-batch; length: tokens of a row, or None for the model's own.
        quantize: "4bit", "8bit" or None.
        dtype: that the base is loaded in, or None; mixed_precision: of the Trainer, or None.
        optim: as TrainingArguments has it.
        base_budget: as `patch()` has it, or None.
        page: file for the HTML page, or None; as_json: whether JSON is printed.
    """

    model: str
    peft: str
    fsdp: str | None = None
    ranks: int | None = None
    memory: int | None = None
    rows: int = 1
    length: int | None = None
    quantize: str | None = None
    dtype: str | None = None
    mixed_precision: str | None = None
    optim: str = "adamw_torch"
    base_budget: str | None = None
    page: Path | None = None
    as_json: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `plan`.

    Args:
        parser: of the command.
    """
    describe(parser, ABOUT, "seconds, for models of any size; no weights are read", CODES, EXAMPLE)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder with a config.json, such a file, or a name of the hub")
    add("--peft", metavar="CONFIG", default="lora", help="adapter_config.json or its folder, or lora or vera (lora)")
    add(
        "--fsdp",
        metavar="FILE",
        help="1, 2, accelerate's YAML or the Trainer's fsdp_config as JSON (2, or 1 without FSDP2)",
    )
    add("--ranks", metavar="N", help="number of ranks (that of the YAML, or 8)")
    add("--memory", metavar="SIZE", help='of each device, such as "24GiB": what fits it?')
    add("--batch", metavar="ROWS", default="1", help="per_device_train_batch_size (1)")
    add("--length", metavar="TOKENS", help="of a row (4096, or what the model has at most)")
    add("--quantize", metavar="KIND", help=f"bitsandbytes' base: {' or '.join(QUANTIZERS)}")
    add("--dtype", metavar="DTYPE", help=f"that the base is loaded in: {', '.join(DTYPES)} (the configuration's own)")
    add("--mixed-precision", metavar="DTYPE", help=f"{', '.join(PRECISIONS)} (that of the YAML, or no)")
    add("--optim", metavar="NAME", default="adamw_torch", help="as TrainingArguments has it (adamw_torch)")
    add("--base-budget", metavar="SIZE", help='of the base that stays full on each rank, such as "8GiB" or "25%%"')
    add("--html", metavar="FILE", help="write a page with a picture, one file that needs no other")
    add("--json", action="store_true", help="print JSON")


def read(given: argparse.Namespace) -> Asked:
    """What a command line asks for.

    Args:
        given: with the arguments of `add_arguments`.

    Raises:
        PlanError: a value is of no use.
    """
    page = None if given.html is None else Path(given.html)
    if page is not None:
        _writable(page)
    residence.check(given.base_budget)
    if given.base_budget == residence.AUTO:
        refuse("--base-budget", "auto asks the device of a run", "Give --memory, which finds the budget that fits")
    return Asked(
        given.model,
        given.peft,
        given.fsdp,
        None if given.ranks is None else _number("--ranks", given.ranks),
        None if given.memory is None else _size(given.memory),
        _number("--batch", given.batch),
        None if given.length is None else _number("--length", given.length),
        _one_of("--quantize", given.quantize, QUANTIZERS),
        _one_of("--dtype", given.dtype, DTYPES),
        _one_of("--mixed-precision", given.mixed_precision, PRECISIONS),
        given.optim,
        given.base_budget,
        page,
        given.json,
    )


def _number(setting: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        refuse(setting, f"{text!r} is no number from 1 on", "Give one, such as 8")
    return int(text)


def _size(text: str) -> int:
    try:
        size = residence.limit(text, 0)
    except PlanError:
        size = 0
    if not size:
        refuse("--memory", f"{text!r} is no size", 'Give one, such as "24GiB" or "80GB"')
    return size


def _one_of(setting: str, value: str | None, known: tuple[str, ...]) -> str | None:
    if value is not None and value not in known:
        refuse(setting, repr(value), f"Use one of {', '.join(known)}")
    return value


def _writable(page: Path) -> None:
    folder = page.parent
    if page.is_dir() or not folder.is_dir():
        refuse("--html", f"{page} is a folder" if page.is_dir() else f"no folder {folder}", "Name a file in a folder")
    if not os.access(folder, os.W_OK):
        refuse("--html", f"{folder} cannot be written to", "Name a file in another folder")


def refuse(subject: str, found: str, remedy: str) -> NoReturn:
    """End the command with one line.

    Args:
        subject: name of the setting.
        found: what was found.
        remedy: what to do.

    Raises:
        PlanError: always.
    """
    raise PlanError(subject, found, "No plan was made", remedy, setting=subject)
