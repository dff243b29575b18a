"""A sample of the matrix in which every method and every set-up appears, stock and patched.

The whole of it is `python tests/matrix/cells.py`; what that last printed is tests/data/matrix.json.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import cells
import pytest
from cells import METHODS, SIDES, Bench, setups, state

ROWS = json.loads((Path(__file__).parent / "data" / "matrix.json").read_text())
SETUPS = {setup.name: setup for setup in setups()}


def sample() -> list[dict[str, str]]:
    """Cells that one process can train, the next one always with the method and the set-up that came least often."""
    able = [row for row in ROWS if "reference" not in row]
    # Ranks that wait for each other are waited for; the sort keeps the order of all others.
    able.sort(key=lambda row: row["stock"].startswith("hung"))
    seen: Counter[str] = Counter()
    chosen = []
    while any(not (seen[row["method"]] and seen[row["setup"]]) for row in able):
        row = min(able, key=lambda row: (bool(seen[row["method"]]) + bool(seen[row["setup"]]), seen[row["setup"]]))
        seen.update((row["method"], row["setup"]))
        chosen.append(row)
    return chosen


def test_the_record_covers_the_whole_matrix_and_patched_is_right_in_it() -> None:
    assert [(row["method"], row["setup"]) for row in ROWS] == [(m, setup.name) for m, setup in cells.cells()]
    assert [row for row in ROWS if state(row, "patched") == "wrong"] == []
    refused = [row for row in ROWS if state(row, "patched") == "refused"]
    assert len(refused) < 0.02 * len(ROWS)
    assert {row["method"] for row in sample()} == set(METHODS)


def test_the_page_has_the_counts_of_the_record() -> None:
    page = (Path(__file__).parent.parent / "docs" / "measured.md").read_text()
    for side in SIDES:
        assert cells.counts(ROWS, side) in page


@pytest.mark.parametrize("row", sample(), ids=lambda row: f"{row['method']}-{row['setup']}".replace(" ", "-"))
def test_cell(bench: Bench, row: dict[str, str]) -> None:
    """Patched equals one process; stock fails where it did, so that this test says when upstream heals."""
    again = cells.measure(bench, row["method"], SETUPS[row["setup"]])
    assert again["patched"] == ""
    assert state(again, "stock") == state(row, "stock"), again["stock"]
