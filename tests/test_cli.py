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


def test_check_fails_where_a_patched_cell_is_wrong(python: Callable[..., str]) -> None:
    code = """
from trainer_fsdp_patch.ranks import collectives
from trainer_fsdp_patch.testing import check
check.SETUPS = check.SETUPS[3:4]
collectives.average_gradients = lambda *args: 0
print(check.run())
"""
    printed = python(code)
    assert printed.endswith("\n1")
    assert "differ between ranks" in printed


def test_check_on_a_number_of_ranks_that_does_not_divide_its_batch(python: Callable[..., str]) -> None:
    code = """
from trainer_fsdp_patch.testing import check
check.SETUPS = check.SETUPS[:1] + check.SETUPS[-1:]
check.ranks = lambda: 3
print(check.run())
"""
    printed = python(code)
    assert "VeRA on 3 ranks" in printed
    assert printed.endswith("\n0")


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
