"""Exit codes and texts of the command line."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import trainer_fsdp_patch
from trainer_fsdp_patch import cli


def test_check_is_right_in_every_set_up() -> None:
    command = [sys.executable, "-m", "trainer_fsdp_patch", "check"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = [line.split("│") for line in finished.stdout.splitlines() if line.startswith("│") and "e-" in line]
    assert len(rows) == 6
    assert [row[3].strip() for row in rows] == ["right"] * 6
    assert [row[2].strip() == "right" for row in rows] == [False, False, False, True, False, False]
    assert finished.stdout.splitlines()[-1] == "6 of 6 right"


STATUSES = """
import contextlib, io, json
from trainer_fsdp_patch import cli
def said(*options):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["status", *options]) == 0
    return out.getvalue()
print(json.dumps([said(), said("--all"), said("--json")]))
"""


@pytest.fixture(scope="module")
def statuses(python: Callable[..., str]) -> list[str]:
    """What `status` prints: what concerns this installation, all, and as JSON. One program imports the targets."""
    said: list[str] = json.loads(python(STATUSES).splitlines()[-1])
    return said


def test_status_as_json_and_as_a_table(statuses: list[str]) -> None:
    table, _, as_json = statuses
    found = json.loads(as_json.splitlines()[-1])
    assert {patch["state"] for patch in found["patches"] if "is outside" not in patch["reason"]} == {"applied"}
    assert set(found["installed"]) == {"accelerate", "bitsandbytes", "peft", "torch", "transformers"}
    assert "accelerate_v1_8_autocast" in table.replace("\n", "")


ENDS_BADLY = {
    "no such command": ["nothing"],
    "an unknown option": ["status", "--yaml"],
    "two forms at once": ["status", "--json", "--markdown"],
    "no folder for the copy": ["repair", "{folder}"],
    "a folder that is not there": ["verify", "{folder}/gone"],
    "a folder without an adapter": ["verify", "{folder}/empty"],
    "a copy of nothing": ["repair", "{folder}/gone", "--out", "{folder}/out"],
    "a copy into a file": ["repair", "{adapter}", "--out", "{folder}/file/out"],
    "a config that is not there": ["repair", "{adapter}", "--out", "{folder}/out", "--config", "{folder}/gone.json"],
    "an unknown method": ["check", "--method", "lorra"],
    "a number of ranks that is none": ["check", "--ranks", "two"],
    "a folder for results that is a file": ["check", "--keep", "{folder}/file"],
    "nothing to run": ["run"],
    "no such script": ["run", "{folder}/gone.py"],
    "no such program": ["run", "no-such-program"],
    "a module without a name": ["run", "-m"],
    "code that is none": ["run", "-c"],
    "a budget that is none": ["run", "--base-budget", "much", "true"],
}


@pytest.mark.parametrize("case", ENDS_BADLY)
def test_bad_input_ends_in_one_line_and_exit_code_2(case: str, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    for folder in (adapter, tmp_path / "empty"):
        folder.mkdir()
    names = [f"base_model.model.0.lora_{part}.weight" for part in "AB"]
    save_file({name: torch.ones(2, 2) for name in names}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    words = [word.format(folder=tmp_path, adapter=adapter) for word in ENDS_BADLY[case]]
    command = [sys.executable, "-m", "trainer_fsdp_patch", *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    # Some packages say something of their own when they are imported.
    *theirs, ours = ended.stderr.splitlines()
    assert not any("Traceback" in line or "trainer_fsdp_patch" in line.replace(str(ROOT), "") for line in theirs), (
        theirs
    )
    assert ours.count(". ") >= 1, ours
    assert sorted(tmp_path.rglob("*")) == before


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer_fsdp_patch", "verify", "--debug", str(tmp_path / "gone")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Traceback" in ended.stderr
    assert "AdapterError" in ended.stderr.splitlines()[-1]


def test_without_a_command_there_is_help_and_with_version_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    helped = capsys.readouterr().out
    assert all(f"\n    {name}" in helped for name in cli.COMMANDS)
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"trainer_fsdp_patch {trainer_fsdp_patch.__version__}\n")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_of_each_command_has_what_a_script_needs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    assert "exit codes:" in text
    assert re.search(r"^examples?:", text, re.MULTILINE)
    for line in re.findall(r"^  python -m trainer_fsdp_patch (.*)", text, re.MULTILINE):
        assert cli.parse(shlex.split(line)).command == name
    assert name == "run" or "duration:" in text


def test_only_seams_is_marked_as_the_maintainers() -> None:
    assert [name for name, command in cli.COMMANDS.items() if "maintainers" in command.help] == ["seams"]


def test_status_shows_what_concerns_this_installation_and_a_summary(statuses: list[str]) -> None:
    short, full = (text.replace("\n", "") for text in statuses[:2])
    assert "accelerate_v1_8_autocast" in short
    assert "accelerate_v0_30_checkpoint" not in short
    assert "accelerate_v0_30_checkpoint" in full
    assert re.search(r"\d+ applied, \d+ skipped; \d+ of other releases are not shown \(`status --all`\)$", short)
    assert re.search(r"\d+ applied, \d+ skipped$", full)


def test_a_notebook_shows_one_line_of_patch_and_a_short_list_of_status(python: Callable[..., str]) -> None:
    code = "import trainer_fsdp_patch; print(repr(trainer_fsdp_patch.patch()));"
    assert re.fullmatch(r"trainer_fsdp_patch: \d+ waiting, \d+ skipped; status\(\) lists them", python(code))
    at_once = python(f"import transformers.trainer, torch; {code}")
    assert re.fullmatch(r"trainer_fsdp_patch: .*\d+ skipped; status\(\) lists them", at_once)
    lines = python(f"{code} print(repr(trainer_fsdp_patch.status()))").splitlines()
    assert re.fullmatch(r"\d+ waiting, \d+ skipped", lines[-1])
    assert "is outside" not in "".join(lines)
    assert len(lines) - 2 == int(lines[-1].split()[0])


@pytest.mark.parametrize("value", ["all", "*", "x, all"])
def test_all_patches_are_left_out(value: str, python: Callable[..., str]) -> None:
    code = """
import os
os.environ["TRAINER_FSDP_PATCH_DISABLE"] = %r
import trainer_fsdp_patch
print({state.state for state in trainer_fsdp_patch.patch()})
"""
    assert python(code % value) == "{'skipped'}"


def test_a_name_that_no_patch_has_is_said_with_the_nearest(python: Callable[..., str]) -> None:
    code = """
import os, warnings
os.environ["TRAINER_FSDP_PATCH_DISABLE"] = "torch_v2_2_frozen_unit,"
import trainer_fsdp_patch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    len(trainer_fsdp_patch.patch())
print(*[warning.message for warning in caught])
"""
    assert python(code) == (
        "TRAINER_FSDP_PATCH_DISABLE: no patch is named torch_v2_2_frozen_unit. It leaves nothing out. "
        "Did you mean torch_v2_2_frozen_units."
    )


def test_an_interrupt_while_the_command_is_imported_leaves_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.abc, sys\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'trainer_fsdp_patch.checking.options':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "trainer_fsdp_patch", "check"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "")
