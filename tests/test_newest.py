"""What `nox -s newest` says of releases, and that its cells call every wrapper once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cover
import newest
import pytest

from trainer_fsdp_patch import support, versions
from trainer_fsdp_patch.patching import registry, seams

RECORD = json.loads(cover.DATA.read_text())


def test_every_wrapper_is_called_by_a_scenario_a_cell_or_its_own_tests() -> None:
    called = set(RECORD["stacks"]).union(*(item["seams"] for item in RECORD["cells"]))
    every = cover.every_seam()
    assert {every[name] for name in set(every) - called} == set(RECORD["tests"])
    assert called <= set(every)
    for name in RECORD["tests"]:
        assert (newest.ROOT / "tests" / "patches" / f"test_{name}.py").exists()


def test_few_cells_are_chosen() -> None:
    called = {("a", "1"): {"x"}, ("b", "1"): {"x", "y"}, ("c", "1"): {"z"}}
    assert cover.chosen(called, {"x", "y", "z", "never"}) == [("b", "1"), ("c", "1")]


def test_what_is_noted_in_ranks(tmp_path: Path) -> None:
    from cells import Bench, Setup

    with cover.noting(tmp_path / "seams") as read:
        bench = Bench(tmp_path)
        outcome, verdict = bench.cell("vera", Setup("f2"), patched=True)
        found = read()
        bench.cell("vera", Setup("f2"), patched=False)
        assert read() == set()
    assert verdict.right, outcome.error
    assert "transformers.trainer.Trainer._wrap_model" in found
    assert found <= set(cover.every_seam())


def change(side: str, before: str, now: str) -> newest.Report:
    report = newest.Report()
    report.compare("stacks", "VeRA FSDP2", side, before, now)
    return report


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions.NEWEST_TESTED, "peft", "0.1")


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (change("patched", "", ""), "right; no seam moved"),
        (change("patched", "", "no adapter file was written"), "wrong: 1 cells are worse"),
        (change("stock", "TypeError", ""), "right; no seam moved; stock has healed in 1 cells"),
        (change("stock", "", "TypeError"), "right; no seam moved"),
    ],
)
@pytest.mark.usefixtures("newer")
def test_the_verdict_of_a_newer_release(report: newest.Report, said: str) -> None:
    assert newest.verdict(report, "peft") == said
    assert newest.verdict(report, "accelerate") == "tested before"


@pytest.mark.usefixtures("newer")
def test_seams_that_moved_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = registry.find("peft_v0_11_merge")
    name = f"{patch.target}.{patch.seams[0].path}"
    report = newest.Report(moves=[seams.Move(name, (patch.name,), "signature", "() -> (model)")])
    assert newest.verdict(report, "peft") == "right; 1 seams moved, read their bodies"
    monkeypatch.setattr(patch.seams[0], "parameters", ("self", "other"))
    assert newest.verdict(report, "peft") == f"broken: {name} signature"


def test_a_patch_that_stands_aside_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = registry.find("peft_v0_11_merge")
    monkeypatch.setattr(patch.seams[0], "parameters", ("self", "other"))
    report = newest.Report()
    newest.moved(report)
    assert list(report.aside) == ["peft_v0_11_merge"]
    assert "- patch peft_v0_11_merge stands aside: " in newest.markdown(report)
    assert all(patch.state == registry.UNUSED for patch in registry.discover().values())


def test_the_page_of_a_report() -> None:
    report = change("patched", "", "no adapter file was written")
    report.seconds = {"stacks": 20.0, "check": 40.5}
    text = newest.markdown(report)
    for package in newest.PACKAGES:
        assert f"| {package} | {versions.installed(package)} | {support.NEWEST[package]} | 0 |" in text
    assert "- stacks VeRA FSDP2, patched: right -> no adapter file was written" in text
    assert text.endswith("1 cells, 1 changed; 60 s: stacks 20 s, check 40 s\n")


def test_each_part_is_compared_with_what_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts themselves run here; what they train is cut down to one cell."""
    import cells
    import stacks

    report, (first, *_) = newest.Report(), list(stacks.scenarios())
    monkeypatch.setattr(stacks, "scenarios", lambda: iter([first]))
    newest.stacked(report)
    assert (report.cells, report.changes) == (2, [])
    wanted = RECORD["cells"][:1]
    chosen = [cell for cell in cells.cells() if (cell[0], cell[1].name) == (wanted[0]["method"], wanted[0]["setup"])]
    monkeypatch.setattr(cells, "cells", lambda: chosen)
    newest.covered(report)
    assert (report.cells, report.changes) == (4, [])


def test_a_test_that_fails_is_a_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tests" / "patches").mkdir(parents=True)
    (tmp_path / "tests" / "patches" / "test_one.py").write_text("def test_it():\n    assert 1 == 2\n")
    data: Any = {"cells": [], "tests": ["one"]}
    (tmp_path / "cover.json").write_text(json.dumps(data))
    monkeypatch.setattr(newest, "ROOT", tmp_path)
    monkeypatch.setattr(newest, "DATA", tmp_path)
    report = newest.Report()
    newest.tested(report)
    [found] = report.changes
    assert (found.cell, found.worse) == ("tests/patches/test_one.py::test_it", True)
    (tmp_path / "tests" / "patches" / "test_one.py").write_text("def test_it():\n    pass\n")
    report = newest.Report()
    newest.tested(report)
    assert report.changes == []
