"""Ranks that are started afresh: what they give, how they end, and that none is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import workers
from conftest import ROOT
from workers import Pool

PROGRAM = f"""
import json, os, pickle, sys, time
sys.path.insert(0, {str(ROOT)!r})
from trainer_fsdp_patch.testing.case import Outcome

job = json.loads(sys.stdin.buffer.readline() or sys.exit(0))
rank = int(job["environment"].get("RANK", -1))
do = job.get("do", "")
if do == "die" and rank == 1:
    print("no kernel for this card", flush=True)
    os._exit(3)
if do == "sleep" or (do == "die" and rank == 0):
    time.sleep(600)
taken = ""
if do == "port" and not os.path.exists(job["mark"]):
    open(job["mark"], "w").close()
    taken = "DistNetworkError: EADDRINUSE, address already in use"
outcome = Outcome(error=taken, extra={{**job["environment"], "hidden": os.environ.get("FSDP_VERSION")}})
with open(job["result"] + ".part", "wb") as file:
    pickle.dump(outcome, file)
os.replace(job["result"] + ".part", job["result"])
os._exit(bool(taken))
"""
"""Does what `gpu_rank.py` does around its jobs, without torch."""


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with Pool(program, {}, tmp_path / "logs", spare=2) as made:
        yield made
    assert all(worker.process.returncode is not None for worker in made.ready)


def test_each_rank_has_the_environment_of_a_launcher_and_nothing_of_another(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_VERSION", "2")
    pool.environment = {**workers.without_launchers(os.environ)}
    found = [outcome.extra for outcome in pool.run({}, 2, seconds=60)]
    assert [extra["RANK"] for extra in found] == ["0", "1"]
    assert found[0]["MASTER_PORT"] == found[1]["MASTER_PORT"]
    assert [extra["hidden"] for extra in found] == [None, None]
    assert len(pool.ready) == 2, "the next ones get ready meanwhile"
    [alone] = pool.run({}, 0, seconds=60)
    assert "RANK" not in alone.extra


def test_a_rank_that_dies_is_told_from_one_that_waits_for_it(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "GRACE", 0.2)
    began = time.monotonic()
    waiting, dead = pool.run({"do": "die"}, 2, seconds=60)
    assert waiting.error == "hung: it did not end in its time"
    assert dead.error == "ended with 3, having said no kernel for this card"
    assert time.monotonic() - began < 30


def test_a_job_ends_with_its_time(pool: Pool) -> None:
    [outcome] = pool.run({"do": "sleep"}, 1, seconds=2)
    assert outcome.error == "hung: it did not end in its time"


def test_a_port_that_was_taken_is_no_failure(pool: Pool, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    [outcome] = pool.run({"do": "port", "mark": str(mark)}, 1, seconds=60)
    assert mark.exists()
    assert outcome.error == ""


RANK = """
import pathlib, sys, time
import gpu_rank

def do(job):
    pathlib.Path(job["mark"]).touch()
    time.sleep(600)

gpu_rank.do = do
gpu_rank.main()
"""

PARENT = """
import json, subprocess, sys, time

rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE)
print(rank.pid, flush=True)
job = {"environment": {}, "result": "/dev/null", "mark": sys.argv[2]}
rank.stdin.write(json.dumps(job).encode() + b"\\n")
rank.stdin.flush()
time.sleep(600)
"""


def test_a_rank_does_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    mark = tmp_path / "works"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "programs", ROOT / "tests" / "helpers")))
    command = [sys.executable, "-c", PARENT, RANK, str(mark)]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout is not None
        rank = int(parent.stdout.readline())
        _until(mark.exists)
        assert _lives(rank)
        parent.kill()
    _until(lambda: not _lives(rank))


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _lives(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
