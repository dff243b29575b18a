"""Every scenario of `checkpoints`, patched: nothing is lost. tests/data/checkpoints.json has both sides."""

import json
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from cells import Bench, Setup

SCENARIOS = list(checkpoints.scenarios())
BY_PATCHES = {checkpoints.config_cut, checkpoints.evaluated, checkpoints.generated, checkpoints.model_only}
"""Those that the patches' own tests run whole, patched and stock."""
HERE = [row for row in SCENARIOS if row[1] not in BY_PATCHES]


@pytest.fixture(scope="module")
def scene(bench: Bench) -> checkpoints.Scene:
    return checkpoints.Scene(bench)


AT_LENGTH = ("torch.compile, FSDP1 full", "torch.compile, FSDP1 sharded", "torch.compile, FSDP2 sharded")
"""A minute of compiling each; the patches' own tests run the first, stock too."""


@pytest.mark.parametrize(
    ("scenario", "setup"),
    [pytest.param(*row[1:], id=row[0], marks=[pytest.mark.long] * (row[0] in AT_LENGTH)) for row in HERE],
)
def test_nothing_is_lost(scene: checkpoints.Scene, scenario: Any, setup: Setup) -> None:
    assert checkpoints.cell(scenario, scene, setup, patched=True) == ""


def test_the_recorded_figures_are_of_these_scenarios() -> None:
    rows = json.loads((Path(__file__).parent / "data" / "checkpoints.json").read_text())
    assert [row["scenario"] for row in rows] == [name for name, _, _ in SCENARIOS]
    assert all(row["patched"] == "" for row in rows)
    counts = [sum(row[side] == "" for row in rows) for side in ("stock", "patched")]
    page = (Path(__file__).parent.parent / "docs" / "measured.md").read_text()
    for side, right in zip(("stock", "patched"), counts, strict=True):
        assert f"{side:8} {len(rows)} scenarios: {right} right, {len(rows) - right} wrong" in page
