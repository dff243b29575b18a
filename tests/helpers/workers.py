"""Ranks in processes that are started afresh, not forked: none inherits the runtime of an accelerator.

A worker imports what it needs and then waits for its job on its standard input. So the next ones get ready while a job
runs. One whose parent has gone reads the end of its input, and ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome

GRACE = 3.0
"""Seconds that ranks get after one of them has failed."""

TRIES = 3
"""How often a job is tried whose port was taken meanwhile."""

LAUNCHERS = ("ACCELERATE_", "FSDP_", "MV2_", "OMPI_", "PMI_", "TORCHELASTIC_", "TRAINER_FSDP_PATCH_")
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def without_launchers(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what a launcher, or this package's user, has set for other runs."""
    return {name: value for name, value in environment.items() if name not in RANKS and not name.startswith(LAUNCHERS)}


def on_loopback() -> dict[str, str]:
    """Has ranks of one machine meet on its loopback: its other interfaces may be behind a firewall."""
    names = [name for _, name in socket.if_nameindex()]
    return {variable: "lo" for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if "lo" in names}


def environments(ranks: int) -> list[dict[str, str]]:
    """What a launcher sets for each rank of one machine."""
    port = forks.free_port()
    return [forks.environment(rank, ranks, port) for rank in range(ranks)]


class Worker:
    """A process that waits for its job.

    Args:
        program: which imports, reads a line of JSON, and pickles an Outcome into the file that it names.
        environment: of the process.
        log: file of what it prints.
    """

    def __init__(self, program: Path, environment: dict[str, str], log: Path) -> None:
        self.log, self.result = log, log.with_suffix(".outcome")
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(program)],
                env=environment, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def give(self, job: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        # One that has died while it imported says so by its exit code.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({**job, "result": str(self.result)}).encode() + b"\n")
            self.process.stdin.flush()

    def outcome(self, late: bool) -> Outcome:
        """What it gave, or how it ended.

        Args:
            late: whether it was killed for its time.
        """
        if self.result.exists():
            given: Outcome = pickle.loads(self.result.read_bytes())
            return given
        code = self.process.returncode
        if late and code == -signal.SIGKILL:
            return Outcome(error="hung: it did not end in its time")
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["nothing"]
        return Outcome(error=f"ended {how}, having said {lines[-1]}", extra={"traceback": "\n".join(lines[-40:])})

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()


class Pool:
    """Starts workers and gives them jobs; at its end none is left.

    Args:
        program: of the workers.
        environment: of each, next to this process's own.
        folder: for what they print and give.
        spare: number of workers that are got ready while others work.
    """

    def __init__(self, program: Path, environment: dict[str, str], folder: Path, spare: int = 0) -> None:
        self.program, self.folder, self.spare = program, folder, spare
        self.environment = {**on_loopback(), **without_launchers(os.environ), **environment}
        self.ready: list[Worker] = []
        self.numbers = itertools.count()
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.ready:
            worker.end()

    def run(self, job: dict[str, Any], ranks: int, seconds: float) -> list[Outcome]:
        """Have ranks do a job, and collect what they give.

        Args:
            job: for each of them.
            ranks: number of them; 0 is one process without the environment of a launcher.
            seconds: after which they are killed.
        """
        deadline = time.monotonic() + seconds
        for left in reversed(range(TRIES)):
            outcomes = self._run(job, environments(ranks) if ranks else [{}], deadline)
            if not (left and any(map(forks.lost_its_port, outcomes))):
                break
        return outcomes

    def _run(self, job: dict[str, Any], environments: list[dict[str, str]], deadline: float) -> list[Outcome]:
        self._prepare(len(environments))
        working = [self.ready.pop(0) for _ in environments]
        try:
            for worker, environment in zip(working, environments, strict=True):
                worker.give({**job, "environment": environment})
            self._prepare(self.spare)
            late = _wait(working, deadline)
        finally:
            for worker in working:
                worker.end()
        return [worker.outcome(late) for worker in working]

    def _prepare(self, wanted: int) -> None:
        while len(self.ready) < wanted:
            self.ready.append(Worker(self.program, self.environment, self.folder / f"{next(self.numbers)}.log"))


def _wait(working: list[Worker], deadline: float) -> bool:
    """Wait until all have ended; whether some have not, though none has failed."""
    failed = None
    # Every one is asked, for asking is what sets its code.
    while None in (codes := [worker.process.poll() for worker in working]):
        if failed is None and any(code not in (None, 0) for code in codes):
            failed = time.monotonic()
        if time.monotonic() > min(deadline, deadline if failed is None else failed + GRACE):
            return True
        time.sleep(0.02)
    return False
