"""The Chinese pages say what the English ones say: the same sections, code, tables and links, in the same order."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import pages
import pytest
from conftest import ROOT

DOCS = ROOT / "docs"
TRANSLATED = sorted((DOCS / "zh").rglob("*.md"))


def original(page: Path) -> Path:
    return DOCS / page.relative_to(DOCS / "zh")


def targets(page: Path, text: str) -> set[str]:
    """Files that a page links, by their English paths."""
    folder = page.parent.relative_to(ROOT).as_posix()
    paths = {posixpath.normpath(posixpath.join(folder, target.partition("#")[0])) for target in pages.links(text)}
    return {path.replace("docs/zh/", "docs/").replace("README.zh-CN.md", "README.md") for path in paths}


def shape(text: str) -> dict[str, list[str]]:
    """What does not depend on the language of a page."""
    prose = pages.CODE.sub("", text)
    return {
        "sections": re.findall(r"^(#+) ", prose, re.MULTILINE),
        "code": [match["text"] for match in pages.CODE.finditer(text)],
        "messages": re.findall(r"^> .*", prose, re.MULTILINE),
        "cells": [str(row.count("|")) for row in re.findall(r"^\|.*", prose, re.MULTILINE)],
        "items": re.findall(r"^(-|\d\.) ", prose, re.MULTILINE),
        "names": sorted(set(re.findall(r"`[^`\n]+`", prose))),
    }


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: str(page.relative_to(DOCS)))
def test_a_translation_has_the_shape_of_its_original(page: Path) -> None:
    ours, theirs = page.read_text(), original(page).read_text()
    assert shape(ours) == shape(theirs)
    assert targets(page, ours) == targets(original(page), theirs)


def test_every_page_of_symptoms_is_translated() -> None:
    named = {path.name for path in (DOCS / "symptoms").glob("*.md")}
    assert {path.name for path in TRANSLATED if path.parent.name == "symptoms"} == named


def test_the_chinese_readme_has_the_code_and_the_settings_of_the_english_one() -> None:
    ours, theirs = ((ROOT / name).read_text() for name in ("README.zh-CN.md", "README.md"))
    assert shape(ours)["code"] == shape(theirs)["code"]
    settings = [re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE) for text in (ours, theirs)]
    assert settings[0] == settings[1]
    assert "](README.md)" in ours
    assert "](README.zh-CN.md)" in theirs


def test_a_difference_is_seen() -> None:
    text = (DOCS / "choosing.md").read_text()
    for changed in (
        text.replace("## In short", "### In short"),
        text.replace("314 coll", "314 | coll"),
        f"{text}\n- a\n",
    ):
        assert shape(changed) != shape(text)
