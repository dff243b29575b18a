"""A pytest plugin that writes what becomes of each test as soon as it is known.

`upstream.py` copies it into a folder of its own, so that runs find it there and nothing else of this repository.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

GRADES = ("passed", "xfailed", "xpassed", "skipped", "failed", "error")
"""Outcomes from harmless to worst; a test has the worst of its parts."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True, help="file that gets a line of JSON for each event")
    parser.addoption("--only", type=Path, help="file of the ids of the tests to run, as a JSON list")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(config.getoption("--outcomes"), config.getoption("--only")))


class Outcomes:
    """Writes events: what was collected, which test has begun, and how it has ended."""

    def __init__(self, path: Path, only: Path | None) -> None:
        self.path = path
        self.only = None if only is None else set(json.loads(only.read_text()))
        self.found: dict[str, tuple[str, str, str]] = {}

    def write(self, **event: Any) -> None:
        # Opened each time: what a test forks must not write again what was buffered here.
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def end(self, test: str, outcome: str, detail: str = "", text: str = "") -> None:
        self.write(test=test, outcome=outcome, detail=detail, text=text)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self.only is not None:
            config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self.only])
            items[:] = [item for item in items if item.nodeid in self.only]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self.end(report.nodeid, *judged(report, "collect"))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write(collected=[item.nodeid for item in session.items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.found.pop(nodeid, None)
        self.write(started=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        new = judged(report, report.when)
        old = self.found.get(report.nodeid)
        if old is None or grade(new[0]) > grade(old[0]):
            self.found[report.nodeid] = new

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.end(nodeid, *self.found.get(nodeid, ("error", "ended without a report", "")))


def grade(outcome: str) -> int:
    return GRADES.index(outcome.partition(" ")[0])


def judged(report: Any, when: str | None) -> tuple[str, str, str]:
    """Outcome of a report, the first line of its error, and the error itself."""
    text = report.longreprtext[-20000:]
    if report.passed:
        return ("xpassed" if hasattr(report, "wasxfail") else "passed"), "", ""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        return ("xfailed" if hasattr(report, "wasxfail") else "skipped"), reason, ""
    crash = getattr(report.longrepr, "reprcrash", None)
    message = (crash.message if crash is not None else text.rstrip().rpartition("\n")[2]).splitlines() or [""]
    word = "failed" if when == "call" else "error"
    return f"{word} ({kind(message[0])})", message[0], text


def kind(message: str) -> str:
    """Name of the exception that a message begins with; an assertion's own text may have none."""
    name = message.removeprefix("E ").strip().partition(":")[0].rpartition(".")[2]
    return name if name.isidentifier() else "AssertionError"
