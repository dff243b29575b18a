"""Ranks that are forked from a parent that has imported everything, and what each of them returns."""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_fsdp_patch import devices
from trainer_fsdp_patch.testing.case import Outcome

if TYPE_CHECKING:
    from multiprocessing.context import ForkContext, SpawnContext
    from multiprocessing.process import BaseProcess

    Context = ForkContext | SpawnContext

logger = logging.getLogger("trainer_fsdp_patch")

TIMEOUT = 60.0
"""Seconds after which ranks that wait for each other are killed."""


PORTS = 4
"""Ports that are tried where another program takes the one that was free."""

_LOG = 100_000
"""Bytes of what a rank wrote that are kept, from the end."""

_CRASHES = ("ended by SIGABRT", "ended by SIGBUS", "ended by SIGSEGV")
"""Errors of a rank that crashed below Python."""

_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl, which Python does not name."""


def launch(function: Callable[..., Outcome], *args: object, ranks: int) -> list[Outcome]:
    """Fork `ranks` processes, run a function in each, and collect what they return.

    No rank outlives this call, whatever ends it.

    Args:
        function: called as `function(*args, rank)` with the environment of a launcher set. It is called again, with
            another port, where another program took the first. And once more where a rank on a CPU ended by a signal of
            its own: of thousands of runs here, a few did so inside of torch, stock ones too.
        *args: for the function. Nothing is pickled, unless this process has begun an accelerator's runtime: its ranks
            are started afresh then.
        ranks: number of processes; one alone gets no distributed environment.

    Returns:
        One outcome for each rank; a rank that died or hung has an error. Each has what all ranks wrote.
    """
    outcomes = _launched(function, args, ranks)
    for _ in range(PORTS - 1):
        if ranks == 1 or not any(map(lost_its_port, outcomes)):
            break
        outcomes = _launched(function, args, ranks)
    fallen = next((outcome.error for outcome in outcomes if outcome.error in _CRASHES), "")
    if fallen and ranks > 1 and not on_accelerators(ranks):
        logger.warning("A rank %s. It is run once more: torch's collectives over gloo do so, rarely.", fallen)
        outcomes = _launched(function, args, ranks)
    return outcomes


def free_port() -> int:
    """A port of 127.0.0.1 that is free now; another program may take it before a rank does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher sets for a rank of one machine.

    Args:
        rank: its number.
        ranks: how many there are.
        port: of 127.0.0.1, where they meet.
    """
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_BYPASS_DEVICE_MAP": "true",
    }  # fmt: skip


def lost_its_port(outcome: Outcome) -> bool:
    """Whether a rank could not begin since another program had taken the port.

    Args:
        outcome: of the rank.
    """
    said = f"{outcome.error} {outcome.extra.get('traceback', '')}".lower()
    return "eaddrinuse" in said or "address already in use" in said


def _launched(function: Callable[..., Outcome], args: tuple[object, ...], ranks: int) -> list[Outcome]:
    """One try, on one port."""
    # Quantizers ask CUDA for its capability as they are imported, and no fork could use CUDA after that.
    begun = devices.has_begun()
    context: Context = multiprocessing.get_context("spawn") if begun else multiprocessing.get_context("fork")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        children = [
            context.Process(target=_child, args=(function, args, rank, ranks, port, f"{folder}/{rank}"))
            for rank in range(ranks)
        ]
        # What is here before the fork is nobody's garbage, and collections in the ranks need not walk all of torch.
        gc.freeze()
        try:
            for child in children:
                child.start()
            _wait(children)
        finally:
            gc.unfreeze()
            for child in children:
                # One that was not started has nothing to be killed.
                if child.pid is not None:
                    child.kill()
                    child.join()
        outcomes = [_read(Path(f"{folder}/{rank}"), child.exitcode) for rank, child in enumerate(children)]
        logs = [_tail(Path(f"{folder}/{rank}.log")) for rank in range(ranks)]
    for outcome in outcomes:
        outcome.logs = logs
    return outcomes


def _wait(children: Sequence[BaseProcess]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while any(child.is_alive() for child in children):
        if any(child.exitcode not in (None, 0) for child in children):
            deadline = min(deadline, time.monotonic() + 3)
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.02)


def _tail(path: Path) -> str:
    return path.read_bytes()[-_LOG:].decode(errors="replace") if path.exists() else ""


def _read(path: Path, code: int | None) -> Outcome:
    if path.exists():
        outcome: Outcome = pickle.loads(path.read_bytes())
        return outcome
    if code == -signal.SIGKILL:
        return Outcome(error="hung: it waited for another rank until it was killed")
    how = f"ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with {code}"
    free = shutil.disk_usage(path.parent).free
    return Outcome(error=how if free > _LOG else f"{how}: {free} bytes are free in {path.parent.parent}")


def on_accelerators(ranks: int) -> bool:
    """Whether each rank gets an accelerator of its own. One accelerator alone is not used: it holds no two ranks.

    Args:
        ranks: number of them; 1 is the process that they are compared with, which takes the same kind of device.
    """
    return devices.count() >= max(2, ranks)


def _show_devices(ranks: int) -> None:
    """Hide accelerators from this process, but for one a rank where all get one."""
    kind, count = devices.current().type, devices.count()
    if kind not in devices.VISIBLE:
        return
    name = devices.VISIBLE[kind]
    visible = os.environ.get(name, ",".join(map(str, range(count)))).split(",")
    os.environ[name] = ",".join(visible[:ranks]) if on_accelerators(ranks) else ""


def _end_with_the_parent() -> None:
    """Undo what the parent does with signals, and end when it ends, however that is."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # What `nohup` and the like have a program ignore stays ignored.
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():
        os._exit(1)


def _child(
    function: Callable[..., Outcome], args: tuple[object, ...], rank: int, ranks: int, port: int, path: str
) -> None:
    _end_with_the_parent()
    _show_devices(ranks)
    if ranks > 1:
        os.environ.update(environment(rank, ranks, port))
    log = os.open(f"{path}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    warnings.simplefilter("ignore")
    try:
        outcome = function(*args, rank)
    except BaseException as error:
        outcome = failed(error, Outcome())
    # A rank that has failed ends with 1, for others may wait for it.
    code = int(bool(outcome.error))
    Path(f"{path}.part").write_bytes(pickle.dumps(outcome))
    os.replace(f"{path}.part", path)
    # Without the handlers of the parent, which may wait for threads that a fork has not.
    os._exit(code)


def failed(error: BaseException, outcome: Outcome) -> Outcome:
    """The error in one line, next to what the run did before it.

    Args:
        error: what a rank raised.
        outcome: what it had by then.
    """
    first = (str(error).strip() or "no text").splitlines()[0]
    extra = {**outcome.extra, "traceback": "".join(traceback.format_exception(error))}
    return Outcome(error=f"{type(error).__name__}: {first}", footprint=outcome.footprint, extra=extra)
