"""The pages: code blocks run or say why not, commands and links exist; and the checks see what is broken."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pages
import pytest
from conftest import ROOT
from pages import PAGES, Fence

from trainer_fsdp_patch.patching import registry

TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
FENCES = [fence for name, text in TEXTS.items() for fence in pages.fences(text, name)]


@pytest.mark.parametrize("fence", FENCES, ids=lambda fence: fence.place)
def test_a_code_block_runs_or_says_why_not(fence: Fence) -> None:
    assert pages.fault(fence) == ""


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_anchors_resolve(name: str) -> None:
    assert pages.dead_links(ROOT / name, TEXTS[name]) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\n1 / 0\n```\n", "ZeroDivisionError"),
        ('```{ .python .no-run reason="" }\n1 / 0\n```\n', "says why"),
        ("<!-- not run: -->\n```python\n1 / 0\n```\n", "ZeroDivisionError"),
        ("```\nx\n```\n", "no check knows blocks of no language"),
        ("```text\nx\n```\n", "nothing says what prints it"),
        ("<!-- printed by: pip install torch; held by: tests/gone.py -->\n```text\nx\n```\n", "no tests/gone.py"),
        ("```sh\npython -m trainer_fsdp_patch statuses\n```\n", "invalid choice"),
        ("```sh\npython -m trainer_fsdp_patch status --yaml\n```\n", "unrecognized arguments: --yaml"),
        ("```sh\npython -m trainer_fsdp_patch verify /nowhere\n```\n", "ended with 2"),
        ("```sh\npython benchmarks/gone.py\n```\n", "no command benchmarks/gone.py"),
        ("```sh\npython benchmarks/save.py --depth 2\n```\n", "benchmarks/save.py has no --depth"),
        ("```sh\npython noxfile.py\n```\n", "nothing runs noxfile.py"),
        ("```sh\npip install torch==2.13.0 && pip install -e '.[tests]'\n```\n", "setup.cfg has no tests"),
        ("```sh\npip install torch==1.0\n```\n", "setup.cfg has no torch==1.0"),
        ("```sh\nnox -s stock\n```\n", "no session stock"),
        ("```sh\npython -m pytest --longer\n```\n", "has no --longer"),
        ("```console\n$ make\nmade\n```\n", "no command make"),
    ],
)
def test_a_broken_block_is_seen(text: str, said: str) -> None:
    [fence] = pages.fences(text, "page")
    assert said in pages.fault(fence)


@pytest.mark.parametrize(
    "text",
    [
        "```python\nimport trainer_fsdp_patch\n```\n",
        '```{ .python .no-run reason="needs a GPU" }\n1 / 0\n```\n',
        "<!-- not run: needs a model hub -->\n```python\n1 / 0\n```\n",
        "```console\n$ nox -s patches  # all\nmany lines\n```\n",
        "```sh\nOMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/vera_text_classification.py --out two\n```\n",
    ],
)
def test_a_sound_block_is_let_through(text: str) -> None:
    [fence] = pages.fences(text, "page")
    assert pages.fault(fence) == ""


@pytest.mark.parametrize(
    "text",
    [
        "[a](gone.md)",
        "![a](tests/data/gone.png)",
        "[a](docs/patches.md#gone)",
        "[a](#gone)\n\n# Here\n",
        "[a](../outside.md)",
        "[a](patches)",
        "[a]: gone.md\n",
        '<a href="gone.md">a</a>',
        "[a](#one--two)\n\n# One - two\n",
    ],
)
def test_a_dead_link_is_seen(text: str) -> None:
    assert len(pages.dead_links(ROOT / "README.md", text)) == 1


def test_links_that_resolve_are_let_through() -> None:
    text = "[a](docs/patches.md#accelerate_v0_30_backward) [b](#here) [c](https://example.org/#x)\n\n# Here\n"
    assert pages.dead_links(ROOT / "README.md", f"{text}\n```sh\n[d](gone.md)\n```\n`[e](gone.md)`") == []


def names_unknown(text: str) -> list[str]:
    """Names that a section of docs/dive.md sends a reader to, and that none of the files it links defines."""
    unknown = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        sources = [ROOT / "docs" / target for target in pages.links(section) if target.endswith(".py")]
        nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
        defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        sentences = re.findall(r"Look at .*", section)
        named = {name for sentence in sentences for name in re.findall(r"`(\w+)`", sentence)} - {"Slot"}
        unknown += sorted(named - defined)
    return unknown


def test_the_dive_names_what_its_files_define() -> None:
    text = TEXTS["docs/dive.md"]
    assert len(re.findall(r"^## \d", text, re.MULTILINE)) == 6
    assert names_unknown(text) == []
    assert names_unknown(text.replace("`prepare`", "`prepared_all`")) == ["prepared_all"]


def skeleton(name: str, called: str) -> ModuleType:
    """A file of docs/skeleton, imported by the name that its copy would have."""
    spec = importlib.util.spec_from_file_location(called, ROOT / "docs" / "skeleton" / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[called] = module
    spec.loader.exec_module(module)
    return module


def test_the_skeleton_is_a_patch_and_passes_its_own_canary(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_declarations import faults

    tests = skeleton("test_patch.py", "test_skeleton")
    made = skeleton("patch.py", tests.NAME)
    for name in ("test_skeleton", tests.NAME):
        monkeypatch.delitem(sys.modules, name)
    assert faults(made.__doc__ or "") == []
    monkeypatch.setitem(registry.discover(), tests.NAME, made.patch)
    tests.test_canary()
    registry.unpatch()


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    docs = ROOT / "docs"
    pages = [str(page.relative_to(docs)) for page in docs.rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in navigation] == []


def test_every_patch_named_in_the_changelog_exists() -> None:
    assert unknown_patches(TEXTS["CHANGELOG.md"]) == []
    assert unknown_patches("Off: `peft_v0_11_gone`, `peft_v0_11_merge`.") == ["peft_v0_11_gone"]


def unclear_entries(text: str) -> list[str]:
    """Entries of the changelog, but for tools, without an origin or a switch."""
    areas = {part.partition("\n")[0]: part for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]}
    entries = [" ".join(item.split()) for area in registry.AREAS for item in areas[area].split("\n- ")[1:]]
    origin = re.compile(r"Upstream: \[[^\]]+\]\(https://github\.com/|An earlier fault of this package")
    switch = re.compile(r"Off: `\w+`(, `\w+`)*\.$|No switch is needed: |` avoids it\.$")
    return [entry for entry in entries if not origin.search(entry) or not switch.search(entry)]


def test_every_entry_of_the_changelog_has_an_origin_and_a_switch() -> None:
    text = TEXTS["CHANGELOG.md"]
    assert re.findall(r"^### (.*)", text, re.MULTILINE) == [*registry.AREAS, "Tools"]
    assert unclear_entries(text) == []
    assert len(unclear_entries(re.sub(r"Upstream:\s+\[trl#3260\]", "[trl#3260]", text))) == 1
    assert len(unclear_entries(text.replace("Off: `peft_v0_11_merge`", "`peft_v0_11_merge`"))) == 1


def test_the_strict_build_is_part_of_ci_and_counts_warnings() -> None:
    """MkDocs counts no warning that `--quiet` hides."""
    [line] = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if "mkdocs build" in line]
    assert "--strict" in line
    assert not re.search(r" (-q|--quiet)\b", line)


def unknown_patches(text: str) -> list[str]:
    names = re.findall(r"\b(?:accelerate|peft|torch|transformers)_v\d+_\d+\w*", text)
    return sorted(set(names) - set(registry.discover()))


def test_the_pages_are_found() -> None:
    assert {Path(name).name for name in TEXTS} >= {"README.md", "patches.md", "measured.md", "dive.md"}
    assert len(FENCES) >= 8
