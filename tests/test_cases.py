"""docs/cases.md, its data and the tests of tests/reports say the same of every case."""

from __future__ import annotations

import json

import cases
import pytest
from conftest import ROOT

ROWS = {row["case"]: row for row in json.loads(cases.DATA.read_text())}
CASES = [(file, case) for file, listed in cases.collected().items() for case in listed]


def test_the_page_is_what_the_data_says() -> None:
    assert cases.PAGE.read_text() == cases.markdown(list(ROWS.values()))


def test_every_case_is_recorded_once() -> None:
    names = [case.name for _, case in CASES]
    assert list(ROWS) == names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("file", "case"), CASES, ids=lambda value: getattr(value, "name", None))
def test_the_record_is_of_this_test(file: str, case: cases.Case) -> None:
    """And stock ended there as the test expects it to."""
    row = ROWS[case.name]
    assert row == {**cases.row_of(file, case), "verdicts": row["verdicts"]}
    assert (ROOT / row["test"]).is_file()
    assert case.link.startswith("https://github.com/")
    assert list(row["verdicts"]) == [setup.name for setup in case.setups]
    for name, (stock, patched) in row["verdicts"].items():
        assert patched == ""
        expected = case.stock.get(name, "")
        assert (expected in stock) if expected else stock == ""
