"""`tests/programs/upstream.py` tells which of upstream's tests patch() changes, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

PATCHED = """
import sys
ours = sys.modules.get("trainer_fsdp_patch")
assert ours is None or {item.state for item in ours.status()} == {"unused"}
"""
"""Fails where patch() was called in the process."""

SUITE = f"""
import os, subprocess, sys, time
from pathlib import Path
import pytest

CODE = {PATCHED!r}


def test_passes():
    pass


def test_fails():
    raise KeyError("on both sides")


@pytest.mark.skip(reason="on both sides")
def test_is_skipped():
    pass


def test_fails_in_a_patched_process():
    exec(CODE)


def test_fails_in_a_patched_child():
    subprocess.run([sys.executable, "-c", CODE], check=True)


def test_fails_otherwise_in_a_patched_process():
    try:
        exec(CODE)
    except AssertionError:
        raise ValueError("another exception")
    raise KeyError("the exception")


def test_passes_in_a_patched_process_alone():
    with pytest.raises(AssertionError):
        exec(CODE)


def test_fails_once():
    runs = Path(__file__).with_suffix(".runs")
    runs.write_text(runs.read_text() + "." if runs.exists() else ".")
    assert runs.read_text() != ".."
"""

DYING = """
import os, sys, time


def test_hangs():
    time.sleep(600)


def test_ends_its_process():
    os._exit(3)


def test_comes_last():
    pass
"""


def upstream(suite: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], Any]:
    """The program on a folder, which is on the path too: how it ended, and what it wrote of the tests."""
    written = suite / "found.json"
    finished = subprocess.run(
        [sys.executable, str(ROOT / "tests/programs/upstream.py"), str(suite), "--json", str(written), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", suite)))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return finished, json.loads(written.read_text()) if written.exists() else None


def short(found: dict[str, Any]) -> dict[str, Any]:
    """By the tests' own names."""
    return {name.rpartition("::")[2]: value for name, value in found.items()}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "test_suite.py").write_text(SUITE)
    return tmp_path


def test_what_patch_changes_is_reported(suite: Path) -> None:
    finished, found = upstream(suite, "--retries", "1")
    assert finished.returncode == 1, finished.stdout + finished.stderr
    differing = {
        "test_fails_in_a_patched_process": ["passed", "failed (AssertionError)"],
        "test_fails_in_a_patched_child": ["passed", "failed (CalledProcessError)"],
        "test_fails_otherwise_in_a_patched_process": ["failed (KeyError)", "failed (ValueError)"],
        "test_passes_in_a_patched_process_alone": ["failed (Failed)", "passed"],
    }
    flaky = {"test_fails_once": ["passed", "failed (AssertionError)"]}
    assert short(found["tests"]) == {
        "test_passes": ["passed", "passed"],
        "test_fails": ["failed (KeyError)", "failed (KeyError)"],
        "test_is_skipped": ["skipped", "skipped"],
        **differing,
        **flaky,
    }
    assert set(short(found["different"])) == set(differing)
    assert set(short(found["flaky"])) == set(flaky)
    assert all(name in finished.stdout for name in differing)


def test_what_is_the_same_both_ways_is_not(suite: Path) -> None:
    """A test that fails on both sides, or now and then, is none of ours."""
    finished, found = upstream(suite, "-k", "(test_passes or test_fails or test_is_skipped) and not patched")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert found["different"] == {}


def test_a_test_that_dies_takes_no_other_with_it(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(DYING)
    finished, found = upstream(tmp_path, "--timeout", "4")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert short(found["tests"]) == {
        "test_hangs": ["timeout", "timeout"],
        "test_ends_its_process": ["crashed", "crashed"],
        "test_comes_last": ["passed", "passed"],
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["-k", "no_such_test"], "no test was found"), (["--", "--no-such-option"], "unrecognized arguments")],
)
def test_nothing_to_compare_is_an_error(suite: Path, arguments: list[str], said: str) -> None:
    finished, found = upstream(suite, *arguments)
    assert finished.returncode == 2
    assert found is None
    assert said in " ".join(finished.stderr.split())


def test_a_run_that_is_not_patched_is_an_error(suite: Path) -> None:
    """Else its outcomes would say that patch() changes nothing."""
    (suite / "wrapt.py").write_text("raise ImportError('broken')")
    finished, found = upstream(suite, "-k", "test_passes")
    assert finished.returncode == 2
    assert found is None
    assert "patch() was called in no process" in finished.stderr
