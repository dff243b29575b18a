"""The command `plan`: from arguments to its answer and its exit code."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from trainer_fsdp_patch.reporting import fitting, options, showing
from trainer_fsdp_patch.reporting.making import Maker


def run(given: argparse.Namespace) -> int:
    """Plan, print, and write the page; `options.NOTHING_FITS` where the memory has room for nothing.

    Args:
        given: with the arguments of `options.add_arguments`.

    Raises:
        PlanError: a value, a file or a setting is of no use.
    """
    import trainer_fsdp_patch

    asked = options.read(given)
    # What can be packed depends on what is patched.
    trainer_fsdp_patch.patch()
    maker = Maker(asked)
    plan = maker.plan()
    ways = (True,) if maker.fsdp.checkpointing else (False, True)
    estimates = [maker.estimate(plan, asked.rows, checkpointing=way) for way in ways]
    found = fitting.fit(maker) if asked.memory is not None else None
    if asked.page is not None:
        from trainer_fsdp_patch.reporting import page

        _write(asked.page, page.render(maker, estimates, found))
    if asked.as_json:
        sys.stdout.write(json.dumps(showing.as_json(maker, estimates, found), indent=2) + "\n")
    else:
        from rich.console import Console

        showing.show(Console(width=None if Console().is_terminal else 140), maker, estimates, found)
    return 0 if found is None or found.fits else options.NOTHING_FITS


def _write(target: Path, text: str) -> None:
    """Write a file completely, or leave what is there."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
