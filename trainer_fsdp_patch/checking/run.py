"""`python -m trainer_fsdp_patch check`: trains an adapter on ranks, stock and patched, next to one process."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from trainer_fsdp_patch import devices
from trainer_fsdp_patch.checking import cells, network, places, report, setups
from trainer_fsdp_patch.checking.errors import CheckError
from trainer_fsdp_patch.checking.options import Options
from trainer_fsdp_patch.checking.progress import Reporter
from trainer_fsdp_patch.errors import message
from trainer_fsdp_patch.testing import forks, targets

if TYPE_CHECKING:
    from rich.console import Console

    from trainer_fsdp_patch.testing.case import Setup

RIGHT, WRONG, REFUSED, INTERRUPTED = 0, 1, 2, 130
"""Exit codes; the last is what a shell gives a program that Ctrl-C has ended."""

RESULT = "check.json"
"""Name of the JSON in a folder that is kept."""


class Interrupts:
    """Has Ctrl-C, SIGTERM and a closed terminal raise KeyboardInterrupt once, so that what is open is closed."""

    def __init__(self) -> None:
        self.seen = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        # Python lets no other thread take signals.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        for other in self._before:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt


def run(options: Options | None = None) -> int:
    """Run the set-ups, print what they gave, and return 0 only if every patched cell is right.

    Args:
        options: as asked for; None is a plain `check`.

    Returns:
        The exit code.
    """
    interrupts = Interrupts()
    try:
        with interrupts, _environment():
            return _run(options or Options())
    except CheckError as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED
    except BaseException as error:
        # An import that a signal breaks off may end with an error of its own.
        if interrupts.seen or isinstance(error, KeyboardInterrupt):
            return _said(INTERRUPTED, "interrupted", "No process is left, and no verdict is given", "Run it again")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _said(REFUSED, str(error), "No verdict is given", "Make room on that disk")
        raise


def _said(code: int, *text: str) -> int:
    sys.stderr.write(message("check", *text) + "\n")
    return code


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What the ranks inherit; afterwards all is as it was."""
    before, timeout = dict(os.environ), forks.TIMEOUT
    os.environ["OMP_NUM_THREADS"] = "1"
    devices.keep_forkable()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        yield
    finally:
        forks.TIMEOUT = timeout
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what packages say of each other as they are imported; their errors are shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _run(options: Options) -> int:
    clock = cells.Clock(options.timeout)
    with places.workplace(options.keep) as folder:
        network.refuse_deaf_loopback()
        console = _console(to_error=options.as_json)
        for text in report.on_releases():
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        ranks = options.ranks or max(2, devices.count())
        if not forks.on_accelerators(ranks):
            network.refuse_deaf_gloo()
        with _quiet():
            targets.import_all()
        setups.refuse_absent(options.method, options.quantize)
        chosen = setups.fitted(options.setups, ranks, options.quantize)
        machine, done = _cells(options, chosen, folder, clock, console)
        found = report.as_json(options, done, chosen, ranks, machine)
        text = json.dumps(found, indent=2, allow_nan=False)
        if options.keep is not None:
            (folder / RESULT).write_text(text + "\n")
        if options.as_json:
            sys.stdout.write(text + "\n")
        else:
            console.print(report.table(options, done, ranks))
            console.print(report.verdict(options, done, chosen), highlight=False, markup=False, soft_wrap=True)
    return RIGHT if len(done) == len(chosen) and all(cell.right for cell in done) else WRONG


def _cells(
    options: Options, chosen: Sequence[Setup], folder: Path, clock: cells.Clock, console: Console
) -> tuple[cells.Machine | None, list[cells.Cell]]:
    """Every cell that the time allows, said as it ends."""
    done: list[cells.Cell] = []
    machine = None
    ranks = chosen[0].ranks
    try:
        machine = cells.begin(folder / "base", ranks, clock)
        cells.leave_aside(machine.aside)
        with Reporter(console, len(chosen) * len(cells.SIDES)) as reporter:
            for text in report.on_runs(options, chosen, ranks, machine):
                reporter.say(text)
            for place, setup in enumerate(chosen):
                reporter.skip_to(place * len(cells.SIDES))
                where = folder / re.sub(r"\W+", "_", setup.name)
                method = setups.METHODS[options.method]

                def began(side: str, name: str = setup.name, reporter: Reporter = reporter) -> None:
                    reporter.began(f"{name}: {side}")

                done.append(cells.run(setup, method, machine.base, where, clock, began))
                reporter.say(report.line(done[-1]))
    except cells.OutOfTime:
        # What is missing is named in the last line.
        return machine, done
    return machine, done


def _console(*, to_error: bool) -> Console:
    """Tables of a file are as wide as they need to be, for nobody resizes it."""
    from rich.console import Console

    probe = Console(stderr=to_error)
    return probe if probe.is_terminal else Console(stderr=to_error, width=140)
