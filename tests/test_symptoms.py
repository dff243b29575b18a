"""The pages by symptom quote what upstream says, as runs without this package are recorded to say it."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import checkpoints
import pytest
from cells import Bench, Setup
from conftest import ROOT
from faults import where

PAGES = sorted((ROOT / "docs" / "symptoms").glob("*.md"))
DATA = ROOT / "tests" / "data"


def recorded() -> list[str]:
    """Every verdict of stock in the matrix and in the cases of public reports."""
    matrix = [row["stock"] for row in json.loads((DATA / "matrix.json").read_text()) if row.get("stock")]
    cases = [pair[0] for row in json.loads((DATA / "cases.json").read_text()) for pair in row["verdicts"].values()]
    return [*matrix, *cases]


def quoted(page: Path) -> list[str]:
    return re.findall(r"^> (\w+Error: .*)", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("message", [line for page in PAGES for line in quoted(page)])
def test_a_quoted_error_is_one_that_stock_raises(message: str) -> None:
    assert any(said.startswith(message) for said in recorded())


def test_there_are_such_errors_and_an_invented_one_is_seen() -> None:
    assert len([line for page in PAGES for line in quoted(page)]) >= 3
    assert not any(said.startswith("ValueError: Must flatten tensors with one dtype") for said in recorded())


@where("transformers>=5.10.dev0")
def test_stock_saves_40_bytes_of_lora_and_peft_only_warns(bench: Bench, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    checkpoints.Scene(bench).run(checkpoints.train, Setup("f1", fsdp=1), patched=False, folder=tmp_path / "run")
    [file] = [path for path in tmp_path.rglob("adapter_model.safetensors") if "checkpoint-" not in str(path)]
    assert file.stat().st_size == 40
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bench.base), file.parent)
    [quote] = re.findall(
        r"^> UserWarning: (.*?) \[", (ROOT / "docs/symptoms/empty-adapter.md").read_text(), re.MULTILINE
    )
    assert any(str(warning.message).startswith(quote) for warning in caught)


def test_the_page_of_choosing_has_the_figures_of_the_table_of_steps() -> None:
    rows = re.findall(
        r"^\| LoRA, (FSDP\d) \| (stock|patched|patched, \d+ %) \|.*\| (\d+) \| ([\d.]+) \| [\d.]+ \|$",
        (ROOT / "docs" / "measured.md").read_text(),
        re.MULTILINE,
    )
    figures = {(side.replace(" %", ""), fsdp): (count, size) for fsdp, side, count, size in rows}
    text = (ROOT / "docs" / "choosing.md").read_text()
    shown = re.findall(
        r"^\| (stock|patched.*?) \| (\d+) coll\w+, ([\d.]+) MiB \| (\d+) coll\w+, ([\d.]+) MiB \|$", text, re.M
    )
    assert len(shown) == 4
    for side, *four in shown:
        key = re.sub(r'`base_budget="(\d+)%"`', r"\1", side)
        assert [*figures[key, "FSDP1"], *figures[key, "FSDP2"]] == four
