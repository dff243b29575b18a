"""pytest processes that `upstream.py` compares: how they are patched, watched and read."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

import trainer_fsdp_patch

PROGRAMS = Path(__file__).resolve().parent
PACKAGE = Path(trainer_fsdp_patch.__file__).resolve().parent
PLUGIN = "trainer_fsdp_patch_outcomes"
REFUSED = "refused"
COLLECTION = 300.0
"""Seconds that imports and collection may take, at least."""

SITE = """\
import importlib.machinery, importlib.util, os, sys

_here = os.path.dirname(os.path.abspath(__file__))
_others = [_entry for _entry in sys.path if os.path.abspath(_entry) != _here]
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _spec is not None:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
"""
"""A `sitecustomize` that hands over to the one that it hides."""

PATCH = """
sys.path.insert(0, {root!r})
import trainer_fsdp_patch

sys.path.remove({root!r})
list(trainer_fsdp_patch.patch())  # Read: else patch() would wait, and hide that it cannot be applied.
with open({log!r}, "a") as _file:
    _file.write(str(os.getpid()) + "\\n")
"""


class Result(NamedTuple):
    """What has become of a test: the outcome with the name of the exception, its first line, and all of it."""

    outcome: str
    detail: str = ""
    text: str = ""


ABSENT = Result("absent")
Results = dict[str, Result]


@dataclass(frozen=True)
class Side:
    """Stock or patched.

    Attributes:
        folder: goes first on PYTHONPATH, with a `sitecustomize` and the plugin.
        patched: whether `patch()` is called.
    """

    folder: Path
    patched: bool

    @property
    def log(self) -> Path:
        """Gets a line from each process that `patch()` was called in."""
        return self.folder / "processes"

    def prepare(self) -> None:
        self.folder.mkdir()
        shutil.copy(PROGRAMS / "outcomes.py", self.folder / f"{PLUGIN}.py")
        self.log.touch()
        patch = PATCH.format(root=str(PACKAGE.parent), log=str(self.log)) if self.patched else ""
        (self.folder / "sitecustomize.py").write_text(SITE + patch)

    def environment(self) -> dict[str, str]:
        # This checkout's own folders would be packages for upstream's tests, `tests` and `examples` among them.
        given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        kept = [entry for entry in given if entry and not Path(entry).resolve().is_relative_to(PACKAGE.parent)]
        path = os.pathsep.join([str(self.folder), *kept])
        return {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}


@dataclass(frozen=True)
class Portion:
    """A test file and how pytest runs it."""

    path: Path
    root: Path
    arguments: list[str]
    timeout: float

    def command(self, *more: str) -> list[str]:
        own = ["-p", PLUGIN, "-p", "no:cacheprovider", "-o", "addopts=", "--rootdir", str(self.root), *more]
        return [sys.executable, "-m", "pytest", *own, str(self.path), *self.arguments]

    @property
    def name(self) -> str:
        return str(self.path.relative_to(self.root))


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a run with all that it has started; launchers give their workers sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def watch(process: subprocess.Popen[bytes], events: Path, timeout: float) -> bool:
    """Wait for a run, and end it where it says nothing for too long.

    Returns:
        Whether it was ended.
    """
    size, last = 0, time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
            return False
        if events.stat().st_size != size:
            size, last = events.stat().st_size, time.monotonic()
        elif time.monotonic() - last > (timeout if size else max(timeout, COLLECTION)):
            kill(process)
            return True


def attempt(side: Side, portion: Portion, only: list[str] | None) -> tuple[Results, list[str]]:
    """One pytest process.

    Returns:
        What has become of tests, and those that it did not come to.
    """
    with tempfile.TemporaryDirectory() as name:
        events, chosen, output = (Path(name) / item for item in ("events", "only", "output"))
        events.touch()
        more = ["--outcomes", str(events)]
        if only is not None:
            chosen.write_text(json.dumps(only))
            more += ["--only", str(chosen)]
        with output.open("wb") as file:
            process = subprocess.Popen(
                portion.command(*more), cwd=portion.root, env=side.environment(), stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                ended = watch(process, events, portion.timeout)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        said = output.read_text(errors="replace")
        # pytest's own code for arguments that it does not understand is 4.
        death = "timeout" if ended else REFUSED if process.returncode == 4 else "crashed"
        return read(events, portion, death, said)


def read(events: Path, portion: Portion, death: str, said: str) -> tuple[Results, list[str]]:
    """What a run has written; where it died, a test has begun and not ended."""
    found: Results = {}
    collected: list[str] | None = None
    running = ""
    for line in events.read_text().splitlines():
        event = json.loads(line)
        if "collected" in event:
            collected = event["collected"]
        elif "started" in event:
            running = event["started"]
        else:
            running = ""
            found[event["test"]] = Result(event["outcome"], event["detail"], event["text"])
    if running:
        found[running] = Result(death, "", said[-4000:])
    elif collected is None and not found:
        found[portion.name] = Result(death, "before any test", said[-4000:])
    left = [name for name in collected or () if name not in found]
    if left and not found:
        return dict.fromkeys(left, Result(death, "before its turn", said[-4000:])), []
    return found, left


def outcomes(side: Side, portion: Portion, only: list[str] | None = None) -> Results:
    """Run tests in as many processes as it takes: one that dies takes only the test that it was at with it."""
    found, left = attempt(side, portion, only)
    while left:
        more, left = attempt(side, portion, left)
        found |= more
    return found
