"""`verify` and `repair`: adapter files and checkpoints of any origin."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_fsdp_patch.commands.parsing import describe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer_fsdp_patch.files.verify import Finding

VERIFY = "whether an adapter file or a checkpoint is alive"
REPAIR = "write a mended copy of an adapter, and say what cannot be mended"


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `verify`.

    Args:
        parser: of the command.
    """
    describe(
        parser,
        "Reads an adapter file, its folder, a checkpoint or the folder of a run, and says what is wrong with it.\n"
        "No model is needed, and nothing that a pickle may hold is run.",
        "as long as the files take to be read",
        "0    nothing is wrong\n1    something is wrong\n2    there is nothing at the path, or it cannot be read",
        "verify out/checkpoint-500",
    )
    parser.add_argument("path", type=Path, help="adapter file, its folder, or a Trainer's checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_repair(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `repair`.

    Args:
        parser: of the command.
    """
    describe(
        parser,
        "Takes names of wrappers out of keys, and an adapter that was never written out of a checkpoint's FSDP part.\n"
        "The original is left as it is.",
        "as long as the files take to be read and written",
        "0    nothing is wrong with the copy\n1    something cannot be mended\n"
        "2    there is nothing at the path, or the copy cannot be written",
        "repair out/checkpoint-500 --out mended",
    )
    parser.add_argument("path", type=Path, help="adapter file, its folder, or a Trainer's checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder for the copy")
    parser.add_argument("--config", type=Path, help="adapter_config.json for an adapter that lacks its own")


def verify(given: argparse.Namespace) -> int:
    """Say what is wrong with a file.

    Args:
        given: with the arguments of `add_verify`.

    Raises:
        AdapterError: there is nothing at the path.
    """
    from trainer_fsdp_patch.files import verify

    findings = verify.verify_path(given.path)
    if given.json:
        rows = [dataclasses.asdict(item) for item in findings]
        alive = all(item.note for item in findings)
        sys.stdout.write(json.dumps({"path": str(given.path), "alive": alive, "findings": rows}) + "\n")
        return int(not alive)
    return _show([], findings, given.path)


def repair(given: argparse.Namespace) -> int:
    """Write a mended copy, and say what is wrong with that.

    Args:
        given: with the arguments of `add_repair`.

    Raises:
        AdapterError: there is nothing at the path.
    """
    from trainer_fsdp_patch.files import repair

    done, findings = repair.repair_path(given.path, given.out, given.config)
    return _show(done, findings, given.out)


def _show(done: Sequence[str], findings: Sequence[Finding], place: Path) -> int:
    from rich.console import Console
    from rich.table import Table

    from trainer_fsdp_patch.files import repair

    console = Console(width=None if Console().is_terminal else 140)
    for line in done:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    faults = [item for item in findings if not item.note]
    for item in findings:
        if item.note:
            console.print(
                f"{item.file} {item.tensor}: note, {item.text}", highlight=False, markup=False, soft_wrap=True
            )
    if not faults:
        console.print(f"{place}: alive, nothing is wrong", highlight=False, markup=False, soft_wrap=True)
        return 0
    table = Table(title=f"{len(faults)} fault{'s' * (len(faults) > 1)}", title_justify="left")
    for column in ("where", "fault", "found", "repair"):
        table.add_column(column, overflow="fold")
    for item in faults:
        mend = "`repair` mends it" if item.repairable else f"cannot: {repair.REASONS[item.fault]}"
        table.add_row(f"{item.file} {item.tensor}".strip(), item.fault, item.text, mend)
    console.print(table, markup=False)
    return 1
