"""The folder in which `check` works: it has to be writable, with room enough, before anything is trained."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trainer_fsdp_patch.checking.errors import CheckError

ROOM = 32 << 20
"""Bytes that the runs may write. Six set-ups on two ranks write a twentieth of it; more ranks write more logs."""

_VARIABLES = ("TMPDIR", "TEMP", "TMP")
_NOTHING = "Nothing was trained"


@contextlib.contextmanager
def workplace(keep: Path | None) -> Iterator[Path]:
    """A folder for the runs, proven by writing into it. What ranks hand to their parent is written there too.

    Args:
        keep: the folder, new or empty; None is one of the system's, which is removed afterwards.

    Yields:
        The folder, as an absolute path.

    Raises:
        CheckError: it cannot be written to, has too little room, or is not empty.
    """
    folder = _temporary() if keep is None else _kept(keep)
    before = tempfile.tempdir
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="check-") as inside:
            tempfile.tempdir = inside
            yield Path(inside) if keep is None else folder
    finally:
        tempfile.tempdir = before


def _temporary() -> Path:
    """The folder that the environment names, also where it is of no use; Python would take another in silence."""
    named = next((name for name in _VARIABLES if os.environ.get(name)), "")
    try:
        folder = Path(os.environ[named] if named else tempfile.gettempdir()).absolute()
    except FileNotFoundError as error:
        raise CheckError("check", f"{error.strerror}", _NOTHING, "Set TMPDIR to a folder with room") from error
    _refuse_useless(folder, f"{named}={folder}" if named else str(folder), "Set TMPDIR to another folder")
    return folder


def _kept(keep: Path) -> Path:
    folder, subject = keep.absolute(), f"check --keep {keep}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(folder.iterdir())
    except OSError as error:
        raise _refused(subject, error, "Name another folder") from error
    if found:
        raise CheckError(subject, f"the folder has {found[0].name} in it", _NOTHING, "Name a new or an empty folder")
    _refuse_useless(folder, subject, "Name another folder")
    return folder


def _refuse_useless(folder: Path, subject: str, remedy: str) -> None:
    """Write as much as the runs may, and take it away: modes, quotas and mounts are the system's to judge."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="check-") as probe:
            for _ in range(ROOM >> 20):
                probe.write(bytes(1 << 20))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(folder).free
            found = f"its disk is full: {free} bytes are free, and {ROOM} are needed"
            raise CheckError(subject, found, _NOTHING, f"Make room, or {remedy[:1].lower()}{remedy[1:]}") from error
        raise _refused(subject, error, remedy) from error


def _refused(subject: str, error: OSError, remedy: str) -> CheckError:
    return CheckError(subject, f"nothing can be written there: {error.strerror or error}", _NOTHING, remedy)
