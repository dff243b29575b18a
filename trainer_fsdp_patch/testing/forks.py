"""Ranks that are forked from a parent that has imported everything, and what each of them returns."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_fsdp_patch.testing.case import Outcome

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

TIMEOUT = 60.0
"""Seconds after which ranks that wait for each other are killed."""


def launch(function: Callable[..., Outcome], *args: object, ranks: int) -> list[Outcome]:
    """Fork `ranks` processes, run a function in each, and collect what they return.

    Args:
        function: called as `function(*args, rank)` with the environment of a launcher set.
        *args: for the function; nothing is pickled.
        ranks: number of processes; one alone gets no distributed environment.

    Returns:
        One outcome for each rank; a rank that died or hung has an error.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        children = [
            context.Process(target=_child, args=(function, args, rank, ranks, port, f"{folder}/{rank}"))
            for rank in range(ranks)
        ]
        # What is here before the fork is nobody's garbage, and collections in the ranks need not walk all of torch.
        gc.freeze()
        for child in children:
            child.start()
        gc.unfreeze()
        _wait(children)
        return [_read(Path(f"{folder}/{rank}"), child.exitcode) for rank, child in enumerate(children)]


def _wait(children: Sequence[BaseProcess]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while any(child.is_alive() for child in children):
        if any(child.exitcode not in (None, 0) for child in children):
            deadline = min(deadline, time.monotonic() + 3)
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.02)
    for child in children:
        child.join()


def _read(path: Path, code: int | None) -> Outcome:
    if not path.exists() and code == -signal.SIGKILL:
        return Outcome(error="hung: it waited for another rank until it was killed")
    if not path.exists():
        return Outcome(error=f"ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with {code}")
    outcome: Outcome = pickle.loads(path.read_bytes())
    return outcome


def _visible(ranks: int) -> str:
    """GPUs for one process or for all ranks: none where there are fewer than two, or fewer than ranks."""
    import torch

    count = torch.cuda.device_count()
    if count < max(2, ranks):
        return ""
    return ",".join(os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:ranks])


def _child(
    function: Callable[..., Outcome], args: tuple[object, ...], rank: int, ranks: int, port: int, path: str
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = _visible(ranks)
    if ranks > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_BYPASS_DEVICE_MAP="true",
        )  # fmt: skip
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
