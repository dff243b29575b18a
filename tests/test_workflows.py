"""The workflows on GitHub: valid by the schema that GitHub publishes, and naming what exists here."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from trainer_fsdp_patch import support

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_there_are_workflows() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "newest.yml"]


def test_each_is_valid() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*command, *map(str, WORKFLOWS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


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
