"""Exit codes and texts of the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from conftest import ROOT


def test_check_is_right_in_every_set_up() -> None:
    command = [sys.executable, "-m", "trainer_fsdp_patch", "check"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = [line.split("│") for line in finished.stdout.splitlines() if line.startswith("│") and "e-" in line]
    assert len(rows) == 6
    assert [row[3].strip() for row in rows] == ["right"] * 6
    assert [row[2].strip() == "right" for row in rows] == [False, False, False, True, False, False]
    assert finished.stdout.splitlines()[-1] == "6 of 6 right"


def test_status_as_json_and_as_a_table(python: Callable[..., str]) -> None:
    code = "import sys; from trainer_fsdp_patch import cli; sys.exit(cli.main(['status'%s]))"
    found = json.loads(python(code % ", '--json'").splitlines()[-1])
    assert {patch["state"] for patch in found["patches"] if "is outside" not in patch["reason"]} == {"applied"}
    assert set(found["installed"]) == {"accelerate", "bitsandbytes", "peft", "torch", "transformers"}
    table = python(code % "")
    assert "accelerate_v1_8_autocast" in table.replace("\n", "")


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["status", "--json", "--markdown"]])
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from trainer_fsdp_patch import cli

    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m trainer_fsdp_patch" in capsys.readouterr().err
