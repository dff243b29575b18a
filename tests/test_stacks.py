"""The record of the stacks: every one of noxfile.py, patched right in all, as docs/measured.md says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import stacks
from conftest import ROOT

from trainer_fsdp_patch import support

RESULTS = json.loads((stacks.DATA / "stacks.json").read_text())
TORCHES = json.loads((stacks.DATA / "torches.json").read_text())


def test_every_stack_is_in_the_record_and_patched_is_right_in_all() -> None:
    found = {tuple(result["installed"][name] for name in stacks.PACKAGES[:3]) for result in RESULTS}
    assert found == set(support.STACKS)
    assert len(found) >= 12
    for result in RESULTS:
        assert len(result["rows"]) >= 8
        assert [row for row in result["rows"] if row["patched"]] == []


def test_patched_is_right_on_other_torch_releases() -> None:
    assert [result["installed"]["torch"].partition("+")[0] for result in TORCHES] == list(support.TORCHES)
    for result in TORCHES:
        assert len(result["rows"]) >= 8
        assert [row for row in result["rows"] if row["patched"]] == []


@pytest.mark.parametrize("results", [RESULTS, TORCHES], ids=["stacks", "torches"])
def test_the_page_has_the_record(results: list[dict[str, Any]]) -> None:
    assert stacks.markdown(results) in (ROOT / "docs" / "measured.md").read_text()


def test_a_wrong_cell_is_printed_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert stacks.table(RESULTS) == 0
    wrong = {"installed": RESULTS[0]["installed"], "rows": [{"scenario": "VeRA", "patched": "lost", "stock": ""}]}
    assert stacks.table([wrong]) == 1
    printed = capsys.readouterr().out
    assert "WRONG 4.40.0 VeRA: lost" in printed
