"""Command line: `check` trains on ranks, `status` lists the patches, `verify` and `repair` are for saved adapters."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.checking import options
from trainer_fsdp_patch.errors import message

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.registry import Status

PAGE = """# Patches

The {count} patches are grouped by when they act.
A patch is applied only where its range of releases holds for what is installed.
`python -m trainer_fsdp_patch status` prints the state of each patch with your versions.
`{disable}=NAME,NAME` leaves patches out, and `*` leaves out all.
This page is what `python -m trainer_fsdp_patch status --markdown` prints, from the declarations.
"""
"""Head of docs/patches.md."""


def parser() -> argparse.ArgumentParser:
    """Every command with its arguments."""
    program = argparse.ArgumentParser(prog="python -m trainer_fsdp_patch", description=__doc__)
    commands = program.add_subparsers(dest="command", required=True)
    options.add_arguments(commands.add_parser("check", help=options.HELP))
    status = commands.add_parser("status", help="which patches concern what is installed")
    form = status.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print docs/patches.md")
    verify = commands.add_parser("verify", help="whether an adapter file or a checkpoint is alive")
    verify.add_argument("path", type=Path, help="adapter file, its folder, or a Trainer's checkpoint")
    verify.add_argument("--json", action="store_true", help="print JSON")
    repair = commands.add_parser("repair", help="write a mended copy of an adapter, and say what cannot be mended")
    repair.add_argument("path", type=Path, help="adapter file, its folder, or a Trainer's checkpoint")
    repair.add_argument("--out", type=Path, required=True, help="folder for the copy")
    repair.add_argument("--config", type=Path, help="adapter_config.json for an adapter that lacks its own")
    seams = commands.add_parser("seams", help="for maintainers: what moved since the newest tested releases")
    seams.add_argument("--record", action="store_true", help="write the installed releases as the tested ones")
    return program


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments behind the program's name; None takes those of the process.

    Returns:
        The exit code. `check --help` has those of `check`. That of `verify` is 0 only if nothing
        is wrong with the file, that of `repair` with its copy.
    """
    given = parser().parse_args(argv)
    if given.command in ("verify", "repair"):
        return _saved(given)
    if given.command in ("check", "seams") and _missing():
        text = message(
            given.command,
            f"{' and '.join(_missing())} not installed",
            "Nothing was done",
            "Install what your project pins",
        )
        sys.stderr.write(f"{text}\n")
        return 2
    if given.command == "check":
        return _check(given)
    if given.command == "seams":
        return _seams(record=given.record)
    if given.markdown:
        import trainer_fsdp_patch

        sys.stdout.write(markdown(trainer_fsdp_patch.status()))
        return 0
    return _status(as_json=given.json)


def _check(given: argparse.Namespace) -> int:
    """Train stock and patched; 2 where an argument is of no use."""
    from trainer_fsdp_patch.checking import run
    from trainer_fsdp_patch.checking.errors import CheckError

    try:
        asked = options.read(given)
    except CheckError as error:
        sys.stderr.write(f"{error}\n")
        return run.REFUSED
    return run.run(asked)


def _saved(given: argparse.Namespace) -> int:
    """Verify, or repair and verify the copy; 2 where there is nothing at the path."""
    from trainer_fsdp_patch.errors import AdapterError
    from trainer_fsdp_patch.files import repair, verify

    done: list[str] = []
    try:
        if given.command == "verify":
            findings = verify.verify_path(given.path)
        else:
            done, findings = repair.repair_path(given.path, given.out, given.config)
    except AdapterError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if given.command == "verify" and given.json:
        rows = [dataclasses.asdict(item) for item in findings]
        sys.stdout.write(json.dumps({"path": str(given.path), "alive": not findings, "findings": rows}) + "\n")
        return int(bool(findings))
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 140)
    for line in done:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if not findings:
        place = given.path if given.command == "verify" else given.out
        console.print(f"{place}: alive, nothing is wrong", highlight=False, markup=False, soft_wrap=True)
        return 0
    table = Table(title=f"{len(findings)} fault{'s' * (len(findings) > 1)}", title_justify="left")
    for column in ("where", "fault", "found", "repair"):
        table.add_column(column, overflow="fold")
    for item in findings:
        mend = "`repair` mends it" if item.repairable else f"cannot: {repair.REASONS[item.fault]}"
        table.add_row(f"{item.file} {item.tensor}".strip(), item.fault, item.text, mend)
    console.print(table, markup=False)
    return 1


def _seams(*, record: bool) -> int:
    from trainer_fsdp_patch.patching import seams
    from trainer_fsdp_patch.testing import targets

    targets.import_all()
    if record:
        seams.write_record()
    return seams.report()


def _missing() -> list[str]:
    return [name for name in ("torch", "transformers", "accelerate", "peft") if versions.installed(name) is None]


def _status(*, as_json: bool) -> int:
    """Import the targets, patch, and print the state of every patch; 1 where one failed."""
    import trainer_fsdp_patch
    from trainer_fsdp_patch.testing import targets

    trainer_fsdp_patch.patch()
    if not _missing():
        targets.import_all()
    states = trainer_fsdp_patch.status()
    installed = {package: str(versions.installed(package) or "absent") for package in versions.NEWEST_TESTED}
    untested = versions.untested()
    if as_json:
        rows = [dataclasses.asdict(state) for state in states]
        sys.stdout.write(json.dumps({"installed": installed, "untested": untested, "patches": rows}) + "\n")
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=", ".join(f"{name} {version}" for name, version in installed.items()), title_justify="left")
        for column in ("patch", "state", "versions", "effect"):
            table.add_column(column, overflow="fold")
        for state in states:
            text = f"{state.state}: {state.reason}" if state.reason else state.state
            text += f" (also wrapped or replaced by {state.foreign})" if state.foreign else ""
            text += f" (too late for {state.late}, wrapped before)" if state.late else ""
            table.add_row(state.name, text, state.versions, state.effect)
        console = Console(width=None if Console().is_terminal else 140)
        console.print(table)
        for package, version in untested.items():
            newest = versions.NEWEST_TESTED[package]
            console.print(f"untested: {package} {version}, newest tested {newest}; `check` judges it", highlight=False)
    return int(any(state.state == "failed" for state in states))


def markdown(states: Sequence[Status]) -> str:
    """docs/patches.md, from the declarations of the patches."""
    from trainer_fsdp_patch.patching import registry
    from trainer_fsdp_patch.patching.awaiting import DISABLE

    parts = [PAGE.format(count=len(states), disable=DISABLE)]
    for area in registry.AREAS:
        parts += [f"## {area}\n", *(_entry(state, DISABLE) for state in states if state.area == area)]
    return "\n".join(parts)


def _entry(state: Status, disable: str) -> str:
    """A patch of the page."""
    return f"""### [`{state.name}`](../patches/{state.name}.py)

{state.effect}

- Repairs: `{state.versions}`
- Issue: [{_label(state.issue)}]({state.issue})
- Fixed in: {state.fixed_in or "not yet"}
- Can be removed when: {state.removal}
- Off: `{disable}={state.name}`
"""


def _label(address: str) -> str:
    """Short name of an address on GitHub: `peft#2407`, or the file of a release."""
    _, _, _, _, project, kind, *rest = address.split("/")
    return f"{rest[-1]} of {project} {rest[0]}" if kind == "blob" else f"{project}#{rest[0]}"
