"""A sample of the matrix in which every method and every set-up appears, stock and patched.

The whole of it is `python tests/matrix/cells.py`; what that last printed is tests/data/matrix.json.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import cells
import mixed
import pytest
from cells import METHODS, SIDES, Bench, setups, state
from faults import where

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


def test_what_is_drawn_together_goes_together() -> None:
    drawn = [mixed.draw(chance) for chance in [random.Random(7)] for _ in range(2000)]
    chance = random.Random(7)
    assert drawn == [mixed.draw(chance) for _ in range(2000)]
    assert {method for method, _, _ in drawn} == set(METHODS)
    seen: dict[str, set[str]] = {}
    for method, fsdp, chosen in drawn:
        setup = mixed.setup_of(fsdp, chosen)
        assert setup.use_orig_params or fsdp == 1
        assert not setup.ram_efficient or fsdp == 2
        assert not setup.activation_checkpointing or setup.wrap != "none" or fsdp == 1
        assert setup.ranks == 2 or not METHODS[method].micro
        for part, settings in chosen.items():
            seen.setdefault(part, set()).add(str(settings))
    assert seen == {part: {str(settings) for settings in choices if settings} for part, choices in mixed.PARTS.items()}


def test_the_fewest_settings_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdict(bench: Any, method: str, setup: cells.Setup, *, patched: bool = True) -> str:
        return "off" if setup.clip < 1 and setup.amp == "bf16" else ""

    monkeypatch.setattr(mixed, "verdict", verdict)
    chosen = {"numbers": {"amp": "bf16"}, "wrap": {"wrap": "size"}, "clip": {"clip": 0.01}, "ranks": {"ranks": 4}}
    assert mixed.smallest(None, "lora", 1, chosen) == ({"numbers": {"amp": "bf16"}, "clip": {"clip": 0.01}}, "off")  # type: ignore[arg-type]


@pytest.mark.parametrize(("setting", "status"), [("amp", 0), ("clip", 1)])
def test_what_is_off_in_16_bits_alone_does_not_count(
    setting: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verdict(bench: Any, method: str, setup: cells.Setup, *, patched: bool = True) -> str:
        return "off by 2e-01 of the update" if getattr(setup, setting) not in ("no", 1.0) else ""

    monkeypatch.setattr(mixed, "verdict", verdict)
    assert mixed.main(["--seed", "7", "--cells", "20"]) == status
    printed = capsys.readouterr().out
    assert ("ROUNDED" in printed, "WRONG" in printed) == (status == 0, status == 1)
    assert ("off in 16 bits alone" in printed.splitlines()[-1]) == (status == 0)


@where("transformers>=5.24", "peft>=0.21")
def test_a_drawn_cell_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mixed.main(["--seed", "7", "--cells", "2", "--json", str(tmp_path / "rows")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 right"
    assert [json.loads(line)["error"] for line in (tmp_path / "rows").read_text().splitlines()] == ["", ""]
