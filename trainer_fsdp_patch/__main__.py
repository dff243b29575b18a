"""`python -m trainer_fsdp_patch`, and the command `trainer-fsdp-patch`."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

_seen: list[int] = []


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Python's own handler, and a note: packages that are being imported may swallow the exception."""
    _seen.append(number)
    raise KeyboardInterrupt


def main() -> int:
    """Run the command line; Ctrl-C ends it without a traceback, also while it is still imported.

    Returns:
        The exit code.
    """
    # A shell that starts a job in the background has it ignore Ctrl-C; that stays.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from trainer_fsdp_patch.cli import main

        code = main()
    except KeyboardInterrupt:
        code = INTERRUPTED
    if _seen or code == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        # Python ends by the signal, not by this code, where Ctrl-C has ever come while `exec()` ran.
        os._exit(INTERRUPTED)
    return code


if __name__ == "__main__":
    sys.exit(main())
