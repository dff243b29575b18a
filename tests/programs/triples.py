"""Random triples of releases from the support window: each is installed, and its scenarios are trained patched.

    python tests/programs/triples.py ENVIRONMENT --count 40 [--seed 0] --json tests/data/triples.json
    python tests/programs/triples.py --table tests/data/triples.json

ENVIRONMENT is the Python of a virtual environment that has torch, bitsandbytes, scipy, pytest and this package. The
triple is installed into it in place of the last one. Releases are drawn from all that the index has since the oldest
supported. A triple that cannot be installed together, or whose stock Trainer does not train or resume one process, is
kept in the record with its error, and another is drawn. FILE is read first, so that a run which was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wheels import releases

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("transformers", "accelerate", "peft")
Triple = tuple[str, ...]
Row = dict[str, Any]


def drawn(known: dict[str, list[str]], seed: int) -> Iterator[Triple]:
    """Triples without end, none twice.

    Args:
        known: releases of each package.
        seed: the same seed gives the same triples for the same releases.
    """
    source = random.Random(seed)
    seen: set[Triple] = set()
    while True:
        triple = tuple(source.choice(known[package]) for package in PACKAGES)
        if triple not in seen:
            seen.add(triple)
            yield triple


def window() -> dict[str, list[str]]:
    """Releases of each package since the oldest supported; the one before it is left out."""
    return {package: releases(package)[1:] for package in PACKAGES}


def last_line(text: str) -> str:
    """What a program that failed said last."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no text")[:300]


def install(python: str, triple: Triple) -> str:
    """Put a triple into the environment; why it cannot be, or ""."""
    pins = [f"{package}=={release}" for package, release in zip(PACKAGES, triple, strict=True)]
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *pins]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return last_line(done.stderr) if done.returncode else ""


def trained(python: str, triple: Triple) -> Row:
    """One row of the record: the triple, torch, and what each scenario gave, or why there is none."""
    row: Row = dict(zip(PACKAGES, triple, strict=True))
    missing = install(python, triple)
    if missing:
        return {**row, "unusable": missing}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [python, "tests/programs/stacks.py", "--no-stock", "--json", str(result)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not result.exists():
            return {**row, "unusable": last_line(done.stderr)}
        found = json.loads(result.read_text())
    row["torch"] = found["installed"]["torch"]
    verdicts = {item["scenario"]: item["patched"] for item in found["rows"]}
    # What one process of stock cannot train or resume is no fault of ranks, and nothing to compare with.
    without = [verdict for verdict in verdicts.values() if verdict.startswith("no reference")]
    if len(without) == len(verdicts):
        return {**row, "unusable": without[0] if without else "no scenario"}
    return {**row, "scenarios": verdicts}


def usable(rows: list[Row]) -> list[Row]:
    """Rows whose triple trains at all."""
    return [row for row in rows if "scenarios" in row]


def wrong(row: Row) -> dict[str, str]:
    """Scenarios of a row that have a reference and are not right."""
    return {name: said for name, said in row["scenarios"].items() if said and not said.startswith("no reference")}


def markdown(rows: list[Row]) -> str:
    """Table of the usable triples, oldest transformers first."""
    from packaging.version import Version

    lines = [f"| {' | '.join((*PACKAGES, 'torch', 'scenarios', 'right'))} |", "| --- " * 6 + "|"]
    for row in sorted(usable(rows), key=lambda row: [Version(row[package]) for package in PACKAGES]):
        compared = [said for said in row["scenarios"].values() if not said.startswith("no reference")]
        names = [*(row[package] for package in PACKAGES), row["torch"].partition("+")[0]]
        lines.append(f"| {' | '.join(names)} | {len(compared)} | {compared.count('')} |")
    return "\n".join(lines) + "\n"


def summary(rows: list[Row]) -> str:
    """One line: how many triples, and how many scenarios of them are right."""
    good = usable(rows)
    bad = sum(len(wrong(row)) for row in good)
    return f"{len(rows)} triples drawn, {len(good)} train and resume in one process, {bad} scenarios of these are wrong"


def record(python: str, path: Path, count: int, seed: int) -> list[Row]:
    """Draw and train until so many triples are usable; each row is written as it ends."""
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    done = {tuple(row[package] for package in PACKAGES) for row in rows}
    for triple in drawn(window(), seed):
        if len(usable(rows)) >= count:
            return rows
        if triple in done:
            continue
        rows.append(trained(python, triple))
        path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        said = rows[-1].get("unusable") or wrong(rows[-1]) or "right"
        sys.stderr.write(f"{len(usable(rows))} {triple}: {said}\n")
    return rows


def main() -> int:
    """Record or print; 1 where a scenario is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", nargs="?", help="Python of the environment")
    parser.add_argument("--count", type=int, default=40, help="how many usable triples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the record")
    parser.add_argument("--table", type=Path, help="print a record instead")
    given = parser.parse_args()
    if given.table is None and not (given.environment and given.json):
        parser.error("give an environment and --json, or --table")
    if given.table:
        rows = json.loads(given.table.read_text())
    else:
        rows = record(given.environment, given.json, given.count, given.seed)
    sys.stdout.write(markdown(rows) + "\n" + summary(rows) + "\n")
    return int(any(wrong(row) for row in usable(rows)))


if __name__ == "__main__":
    sys.exit(main())
