"""A sample of the matrix in which every method and every set-up appears, stock and patched.

The whole of it is `python tests/matrix.py`; what that last printed is tests/data/matrix.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matrix import METHODS, Bench, setups

ROWS = json.loads((Path(__file__).parent / "data" / "matrix.json").read_text())
SETUPS = {setup.name: setup for setup in setups()}


def sample() -> list[dict[str, Any]]:
    """Two methods for each set-up, in rotation, of those that one process can train."""
    chosen = []
    for index, name in enumerate(SETUPS):
        able = [row for row in ROWS if row["setup"] == name and row["reference"] == "ok"]
        picks = {(2 * index + offset) % len(able) for offset in (0, 1)}
        chosen += [able[pick] for pick in sorted(picks)]
    return chosen


def test_the_record_covers_the_whole_matrix_and_patched_is_right_in_it() -> None:
    assert {(row["method"], row["setup"]) for row in ROWS} == {(m, s) for m in METHODS for s in SETUPS}
    assert [row for row in ROWS if row["reference"] == "ok" and row["patched"]["error"]] == []
    assert {row["method"] for row in sample()} == set(METHODS)


@pytest.mark.parametrize("row", sample(), ids=lambda row: f"{row['method']}-{row['setup']}".replace(" ", "-"))
def test_cell(bench: Bench, row: dict[str, Any]) -> None:
    """Patched equals one process; stock fails where it did, so that this test says when upstream heals."""
    setup = SETUPS[row["setup"]]
    _, patched = bench.cell(row["method"], setup, patched=True)
    assert patched.right, patched.error
    _, stock = bench.cell(row["method"], setup, patched=False)
    assert stock.right == (row["stock"]["error"] == ""), stock.error
