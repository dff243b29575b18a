"""Writes docs/releases.md from the support window and from the records of what ran on each release.

python tests/programs/window.py > docs/releases.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import triples
from packaging.version import Version

from trainer_fsdp_patch import support

DATA = Path(__file__).parent.parent / "data"
WRAPPED = ("transformers", "accelerate", "peft")

PAGE = """# Releases

The window of supported releases is `trainer_fsdp_patch/support.py`.
`python tests/programs/window.py` makes this page from it, and from the records in `tests/data`.
A release in between that is not listed has to work as well: the random triples below are a sample of those.

{window}
- Matrix: [every method and set-up](measured.md), and all tests. The tests ran with the newest torch too.
- Stacks: five adapters on both versions of FSDP, trained, saved and resumed, stock and patched.
- Triples: the same scenarios, patched.
- Check: `python -m trainer_fsdp_patch check`, next to the newest of the others.
- Python {python}: {newest} is the newest that installs there. The test extra takes it.

A release that is newer than the newest here gets the patches whose functions still have the known signatures.
`status` names it, and `check` says whether an adapter trains right on it.

## Random triples

`python tests/programs/triples.py ENVIRONMENT --count 40 --json tests/data/triples.json` draws these.
{summary}.
The others cannot be installed together, or one process of stock does not train or resume on them.

{triples}"""


def trained_on() -> dict[str, dict[str, set[str]]]:
    """Releases of each package, by how they were tested."""
    found: dict[str, dict[str, set[str]]] = {
        package: {
            "matrix": {support.PINNED.get(package, "3.11")},
            "stacks": set(),
            "triples": set(),
            "check": set(support.CHECKED.get(package, ())),
        }
        for package in support.OLDEST
    }
    for stack in support.STACKS:
        for package, release in zip(WRAPPED, stack, strict=True):
            found[package]["stacks"].add(release)
    found["torch"]["stacks"].update(support.TORCHES)
    for row in triples.usable(rows()):
        for package in (*WRAPPED, "torch"):
            found[package]["triples"].add(row[package].partition("+")[0])
    return found


def rows() -> list[dict[str, Any]]:
    """The record of the triples."""
    found: list[dict[str, Any]] = json.loads((DATA / "triples.json").read_text())
    return found


def window() -> str:
    """A line for each package: the ends of the window, and how many releases of it were tested how."""
    lines = ["| package | oldest | newest | matrix | stacks | triples | check |", "| --- " * 7 + "|"]
    for package, how in trained_on().items():
        ends = [support.OLDEST[package], support.NEWEST[package]]
        lines.append(f"| {' | '.join([package, *ends, *map(_listed, how.values())])} |")
    return "\n".join(lines) + "\n"


def _listed(found: set[str]) -> str:
    """Releases where they are few, else their number."""
    if len(found) > 6:
        return f"{len(found)} releases"
    return ", ".join(sorted(found, key=Version)) or "-"


def page() -> str:
    """docs/releases.md."""
    newest = " and ".join(f"{package} {release}" for package, release in support.OLDEST_PYTHON.items())
    ends = {"python": support.OLDEST["python"], "newest": newest}
    return PAGE.format(window=window(), **ends, summary=triples.summary(rows()), triples=triples.markdown(rows()))


if __name__ == "__main__":
    sys.stdout.write(page())
