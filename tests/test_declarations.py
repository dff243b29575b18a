"""What each patch declares: its docstring's lines, and docs/patches.md, which is made of them."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

import trainer_fsdp_patch
from trainer_fsdp_patch.commands import states
from trainer_fsdp_patch.patching import registry

FORM = re.compile(
    rf"(?P<effect>[A-Z].*\.)\n\nArea: (?P<area>{'|'.join(registry.AREAS)})\n"
    r"Issue: https://github\.com/\S+\nCan be removed when: (?P<removal>\S.*\.)"
)


def faults(documentation: str) -> list[str]:
    """What a patch's docstring lacks; `Fixed in` is the declaration's alone."""
    form = FORM.fullmatch(documentation.strip())
    if form is None:
        return ["not an effect, Area, Issue and Can be removed when"]
    long = [name for name in ("effect", "removal") if len(form[name].split()) > 20]
    return [f"{name} has more than 20 words" for name in long]


@pytest.mark.parametrize("name", registry.discover())
def test_a_docstring_says_effect_area_issue_and_when_to_remove(name: str) -> None:
    module = __import__(f"trainer_fsdp_patch.patches.{name}", fromlist=["patch"])
    assert faults(module.__doc__) == []


def test_a_broken_docstring_is_seen() -> None:
    right = "Does it.\n\nArea: Saving\nIssue: https://github.com/a/b/pull/1\nCan be removed when: never.\n"
    assert faults(right) == []
    assert faults(right.replace("Saving", "Sleeping"))
    assert faults(right + "Fixed in: b 1.0\n")
    assert faults(right.replace("Can be removed when: never.", ""))
    assert faults(right.replace("Does it", "Does " + 20 * "it ")) == ["effect has more than 20 words"]


def test_the_page_is_made_of_the_declarations() -> None:
    assert (ROOT / "docs" / "patches.md").read_text() == states.markdown(trainer_fsdp_patch.status())


def entries(page: str) -> dict[str, dict[str, str]]:
    """The lines of each patch on the page, by its name."""
    parts = re.split(r"^### \[`(\w+)`\].*$", page, flags=re.MULTILINE)[1:]
    lines = (re.findall(r"^- ([A-Z][a-z ]+): (\S.*)$", body, re.MULTILINE) for body in parts[1::2])
    return dict(zip(parts[::2], map(dict, lines), strict=True))


def incomplete(page: str) -> list[str]:
    """Patches of the page that lack a line."""
    wanted = {"Repairs", "Issue", "Fixed in", "Can be removed when", "Off"}
    return [name for name, lines in entries(page).items() if set(lines) != wanted]


def test_every_entry_of_the_page_is_complete() -> None:
    page = (ROOT / "docs" / "patches.md").read_text()
    assert incomplete(page) == []
    assert sorted(entries(page)) == sorted(registry.discover())
    declared = {name: patch.fixed_in or "not yet" for name, patch in registry.discover().items()}
    assert {name: lines["Fixed in"] for name, lines in entries(page).items()} == declared


@pytest.mark.parametrize("line", ["Issue", "Fixed in", "Can be removed when"])
def test_an_incomplete_entry_is_seen(line: str) -> None:
    page = (ROOT / "docs" / "patches.md").read_text()
    broken = re.sub(rf"^- {line}: .*\n", "", page, count=1, flags=re.MULTILINE)
    assert incomplete(broken) == [next(iter(entries(page)))]
