"""`status`: which patches concern what is installed, as a table, as JSON, and as docs/patches.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from typing import TYPE_CHECKING

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.commands.parsing import describe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer_fsdp_patch.patching.registry import Status

HELP = "which patches concern what is installed"

PAGE = """# Patches

The {count} patches are grouped by when they act.
A patch is applied only where its range of releases holds for what is installed.
`python -m trainer_fsdp_patch status` prints the state of each patch with your versions.
`{disable}=NAME,NAME` leaves patches out, and `all` leaves out all.
This page is what `python -m trainer_fsdp_patch status --markdown` prints, from the declarations.
"""
"""Head of docs/patches.md."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `status`.

    Args:
        parser: of the command.
    """
    describe(
        parser,
        "Imports what the patches wrap, applies them, and says which are applied and which are not, and why.",
        "as long as torch, transformers, accelerate and peft take to be imported",
        "0    no patch failed\n1    a patch that concerns what is installed could not be applied",
        "status --all",
    )
    parser.add_argument("--all", action="store_true", help="those of other releases too")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, of all patches")
    form.add_argument("--markdown", action="store_true", help="print docs/patches.md")


def run(given: argparse.Namespace) -> int:
    """Import the targets, patch, and print the state of every patch; 1 where one failed.

    Args:
        given: with the arguments of `add_arguments`.
    """
    import trainer_fsdp_patch
    from trainer_fsdp_patch.testing import targets

    if given.markdown:
        sys.stdout.write(markdown(trainer_fsdp_patch.status()))
        return 0
    trainer_fsdp_patch.patch()
    if not versions.missing():
        targets.import_all()
    states = trainer_fsdp_patch.status()
    if given.json:
        counted = Counter(state.state for state in states)
        rows = [dataclasses.asdict(state) for state in states]
        found = {"installed": _installed(), "untested": versions.untested(), "summary": counted, "patches": rows}
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        _show(states, every=given.all)
    return int(any(state.state == "failed" for state in states))


def _installed() -> dict[str, str]:
    return {package: str(versions.installed(package) or "absent") for package in versions.NEWEST_TESTED}


def _show(states: Sequence[Status], *, every: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from trainer_fsdp_patch.patching import showing

    title = ", ".join(f"{name} {version}" for name, version in _installed().items())
    table = Table(title=title, title_justify="left")
    for column in ("patch", "state", "versions", "effect"):
        table.add_column(column, overflow="fold")
    shown = [state for state in states if every or showing.concerns(state)]
    for state in shown:
        text = f"{state.state}: {state.reason}" if state.reason else state.state
        text += f" (also wrapped or replaced by {state.foreign})" if state.foreign else ""
        text += f" (too late for {state.late}, wrapped before)" if state.late else ""
        table.add_row(state.name, text, state.versions, state.effect)
    console = Console(width=None if Console().is_terminal else 140)
    if shown:
        console.print(table)
    for package, version in versions.untested().items():
        newest = versions.NEWEST_TESTED[package]
        console.print(f"untested: {package} {version}, newest tested {newest}; `check` judges it", highlight=False)
    hidden = len(states) - len(shown)
    rest = f"; {hidden} of other releases are not shown (`status --all`)" if hidden else ""
    console.print(f"{showing.summary(states)}{rest}", highlight=False)


def markdown(states: Sequence[Status]) -> str:
    """docs/patches.md, from the declarations of the patches.

    Args:
        states: of all patches.
    """
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
