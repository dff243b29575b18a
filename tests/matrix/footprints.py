"""What FSDP takes of a rank with every method: units, bytes gathered at once, bytes at rest, collectives a step.

`python tests/matrix/footprints.py` trains two steps of each on models of four layers, stock beside patched, FSDP1 and
FSDP2, and fails where a patched run takes more than its plan says or than stock. `--json FILE` records the numbers,
`--only TEXT` keeps the methods whose name has TEXT and the rows of the others in the record; `--markdown` prints the
table of the record. Numbers are counts: they are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import architectures
from cells import METHODS, SIDES, Bench, Row, Setup, beside, has, numbers

from trainer_fsdp_patch.testing import beyond, forks, trial

DATA = Path(__file__).parent.parent / "data" / "footprints.json"
NAMES = ("units", "rest", "base", "replicated", "gathered", "collectives")
LAYERS, STEPS = 4, 2
SETUPS = {1: Setup("f1", fsdp=1), 2: Setup("f2", fsdp=2)}


def cases(only: str = "") -> Iterator[tuple[str, int]]:
    """Methods and versions of FSDP; a method of which the table says less is one of these."""
    return ((method, fsdp) for method in METHODS if only in method for fsdp in SETUPS)


def enlarge() -> None:
    """Have models of LAYERS layers written and STEPS steps trained from now on, in this process."""
    architectures.LAYERS, trial.STEPS = LAYERS, STEPS


def count(bench: Bench, method: str, fsdp: int, sides: tuple[str, ...] = SIDES) -> Row:
    """The numbers of one method: for each side those of NAMES, or None where a run ends before its first step."""
    row: Row = {"method": method, "fsdp": fsdp}
    took = {}
    for side in sides:
        where = bench.folder / f"{method} {fsdp} {side}".replace(" ", "-")
        base = bench.base_of(METHODS[method].architecture)
        outcome = trial.run(SETUPS[fsdp], METHODS[method], base, where, patched=side == "patched")
        took[side] = outcome.footprint
        row[side] = outcome.footprint and numbers(outcome.footprint)
    ours = took["patched"]
    row["planned"] = outcome.planned and numbers(outcome.planned)
    if ours is None or outcome.error:
        row["fault"] = outcome.error
    else:
        row["fault"] = beyond.fault(ours, outcome.planned, None) or beside(ours, took.get("stock"))
    return row


PAGE = """# What FSDP takes of a rank

Every method is trained for two steps, stock next to patched, on models of four layers and two ranks. *Units* are FSDP
units that hold something of the base. *Gathered* is the largest number of bytes that units had gathered at once in a
step, padding included. A run that ends before its first step has none. `python tests/matrix/footprints.py` counts
afresh, and with `--markdown > docs/footprints.md` it writes this page from `tests/data/footprints.json`.

"""


def markdown(rows: list[Row]) -> str:
    """The page of units and largest gathered bytes, stock -> patched, of every method."""
    found = {(row["method"], row["fsdp"]): row for row in rows}
    head = "| method | " + " | ".join(f"units, FSDP{fsdp} | gathered, FSDP{fsdp}" for fsdp in SETUPS) + " |"
    lines = [head, f"| --- |{' --- | --- |' * len(SETUPS)}"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [_both(found[method, fsdp], name) for fsdp in SETUPS for name in ("units", "gathered")]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return PAGE + "\n".join(lines) + "\n"


def _both(row: Row, name: str) -> str:
    place = NAMES.index(name)
    return " -> ".join("none" if row[side] is None else f"{row[side][place]:,}" for side in SIDES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="keep methods whose name contains this")
    parser.add_argument("--part", default="0/1", help="N/M is the part N of M, from 0 on")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, beside those of other methods in it")
    parser.add_argument("--markdown", action="store_true", help="print the table of the record instead")
    given = parser.parse_args()
    if given.markdown:
        sys.stdout.write(markdown(json.loads((given.json or DATA).read_text())))
        return 0
    enlarge()
    # Stock runs that hang do so for ever.
    forks.TIMEOUT = 15.0
    part, parts = map(int, given.part.split("/"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for method, fsdp in list(cases(given.only))[part::parts]:
            if has(method):
                rows.append(count(bench, method, fsdp))
                sys.stdout.write(f"{rows[-1]}\n")
                sys.stdout.flush()
    if given.json:
        write(given.json, rows)
    return int(any(row["fault"] for row in rows))


def write(record: Path, rows: list[Row]) -> None:
    """Rows in the order of the methods, in place of theirs in an earlier record."""
    known = json.loads(record.read_text()) if record.exists() else []
    found = {(row["method"], row["fsdp"]): row for row in (*known, *rows)}
    kept = [found[case] for case in cases() if case in found]
    record.write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")


if __name__ == "__main__":
    sys.exit(main())
