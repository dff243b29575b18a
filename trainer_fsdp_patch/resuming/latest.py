"""Which checkpoint a run resumes from that asks for its last one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_fsdp_patch.errors import warn
from trainer_fsdp_patch.files import reading, verify
from trainer_fsdp_patch.ranks import agreement

if TYPE_CHECKING:
    from transformers import Trainer

SEARCHING: ContextVar[Trainer | None] = ContextVar("SEARCHING", default=None)
"""The Trainer that looks for its last checkpoint, or None."""


@contextlib.contextmanager
def searching(trainer: Trainer) -> Iterator[None]:
    """Around a `train()` that looks for its last checkpoint.

    Args:
        trainer: under FSDP, with an adapter.
    """
    token = SEARCHING.set(trainer)
    try:
        yield
    finally:
        SEARCHING.reset(token)


def last_checkpoint(upstream: Callable[[str], str | None], folder: str) -> str | None:
    """The newest checkpoint of a run whose writer has finished, the same on all ranks.

    The main process decides: the disks of other machines may lack what it alone has written.

    Args:
        upstream: transformers' own, which takes the newest folder by its number.
        folder: of the run.

    Returns:
        Path of the checkpoint, or None where there is none.

    Raises:
        RankError: another rank has ended.
    """
    trainer = SEARCHING.get()
    assert trainer is not None
    # The first search is train()'s own; a callback that searches later may be on one rank alone.
    SEARCHING.set(None)
    newest = upstream(folder)
    skipped: list[str] = []
    chosen = None if newest is None else Path(newest).name
    for item in reading.checkpoints(Path(folder)) if newest and trainer.is_world_process_zero() else []:
        chosen = item.name
        lacks = verify.unfinished(item)
        if not lacks:
            break
        skipped.append(f"{item.name} ({lacks[0]})")
        chosen = None
    chosen, skipped = agreement.from_main((chosen, skipped), "choice of a checkpoint")
    if skipped:
        warn(
            str(folder),
            f"the last checkpoint is not complete: {', '.join(skipped)}",
            f"The run resumes from {chosen}" if chosen else "There is none to resume from",
            "Remove the folders that are not complete; `python -m trainer_fsdp_patch verify` says what they lack",
        )
    return None if chosen is None else os.path.join(folder, chosen)
