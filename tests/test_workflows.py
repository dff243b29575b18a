"""The workflows on GitHub: valid by the schema that GitHub publishes, and naming what exists here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import trainer_fsdp_patch
from trainer_fsdp_patch import cli, support

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_there_are_workflows() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "newest.yml", "release.yml"]


FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


@pytest.mark.parametrize(
    ("schema", "paths"),
    [
        ("vendor.github-workflows", WORKFLOWS),
        ("vendor.github-issue-forms", FORMS),
        ("vendor.citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_each_is_valid(schema: str, paths: list[Path]) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    done = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_forms_ask_for_what_is_installed() -> None:
    assert [path.name for path in FORMS] == ["release.yml", "run.yml"]
    for path in FORMS:
        assert "python -m trainer_fsdp_patch status --json" in path.read_text()
    for command in re.findall(r"python -m trainer_fsdp_patch ([^`]*)`", "".join(path.read_text() for path in FORMS)):
        cli.parse(command.split())


def test_revisions_of_pre_commit_are_frozen() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    revisions = re.findall(r"rev: (.*)", text)
    assert revisions
    assert all(re.fullmatch(r"[0-9a-f]{40} # frozen: v[\d.]+", revision) for revision in revisions)
    [pin] = set(re.findall(r"ruff==[\d.]+", text))
    assert pin.replace("==", " == ") in (ROOT / "setup.cfg").read_text()


def test_a_release_is_published_without_a_token() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    assert "id-token: write" in text
    assert "secrets." not in text
    assert f"version: {trainer_fsdp_patch.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_sessions_and_files_exist(path: object) -> None:
    text = path.read_text()  # type: ignore[attr-defined]
    sessions = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.MULTILINE))
    for line in re.findall(r"nox -s ([\w ]+)", text):
        assert set(line.split()) <= sessions
    for file in re.findall(r"tests/[\w/.]+", text):
        assert (ROOT / file).exists(), file


def test_ci_installs_the_torch_of_the_window() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r"torch==([\d.]+)", text) == [support.PINNED["torch"]]
    pythons = re.findall(r'"(3\.\d+)"', re.search(r"python: \[.*\]", text)[0])  # type: ignore[index]
    assert pythons == [support.OLDEST["python"], support.NEWEST["python"]]


def test_one_of_them_runs_each_week_and_may_write_issues() -> None:
    text = (ROOT / ".github" / "workflows" / "newest.yml").read_text()
    assert re.search(r"cron: \"\d+ \d+ \* \* \d\"", text)
    assert "issues: write" in text
