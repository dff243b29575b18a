"""The support window: docs/releases.md, and the random triples that it rests on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import triples
import window
from conftest import ROOT
from packaging.version import Version

from trainer_fsdp_patch import support

ROWS = window.rows()


def test_the_page_is_what_the_program_prints() -> None:
    assert (ROOT / "docs" / "releases.md").read_text() == window.page()


def test_forty_triples_are_right_in_every_scenario() -> None:
    good = triples.usable(ROWS)
    assert len(good) >= 40
    assert [(row, triples.wrong(row)) for row in good if triples.wrong(row)] == []
    assert all(any(not said for said in row["scenarios"].values()) for row in good)


def test_they_lie_in_the_window_and_on_many_releases_of_torch() -> None:
    for row, package in itertools.product(ROWS, triples.PACKAGES):
        assert Version(support.OLDEST[package]) <= Version(row[package]) <= Version(support.NEWEST[package])
    torches = {row["torch"].partition("+")[0] for row in triples.usable(ROWS)}
    assert len(torches) >= 5
    assert len({tuple(row[package] for package in triples.PACKAGES) for row in ROWS}) == len(ROWS)


def test_the_same_seed_draws_the_same() -> None:
    known = {package: [f"1.{number}" for number in range(9)] for package in triples.PACKAGES}
    first, again, other = (list(itertools.islice(triples.drawn(known, seed), 60)) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 60


def test_a_record_goes_on_where_it_was_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def trained(python: str, triple: triples.Triple) -> triples.Row:
        asked.append(triple)
        row = dict(zip(triples.PACKAGES, triple, strict=True))
        usable = {"torch": "2.13.0", "scenarios": {"VeRA FSDP1": "", "IA3 FSDP1": "no reference: x"}}
        return {**row, **({"unusable": "ImportError"} if len(asked) % 2 else usable)}

    monkeypatch.setattr(triples, "window", lambda: {name: ["1.0", "1.1", "1.2"] for name in triples.PACKAGES})
    monkeypatch.setattr(triples, "trained", trained)
    path = tmp_path / "triples.json"
    assert len(triples.usable(triples.record("python", path, 2, 0))) == 2
    rows = triples.record("python", path, 4, 0)
    assert len(asked) == len(set(asked)) == len(rows) == 8
    assert json.loads(path.read_text()) == rows
    assert triples.summary(rows) == "8 triples drawn, 4 train and resume in one process, 0 scenarios of these are wrong"
    assert triples.markdown(rows).splitlines()[2].endswith("| 2.13.0 | 1 | 1 |")
    rows[1]["scenarios"]["VeRA FSDP1"] = "no adapter file was written"
    assert triples.wrong(rows[1]) == {"VeRA FSDP1": "no adapter file was written"}
    assert "1 scenarios of these are wrong" in triples.summary(rows)
