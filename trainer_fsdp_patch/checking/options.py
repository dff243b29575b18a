"""The command line of `check`: its arguments, its help, and what is refused before anything is imported."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_fsdp_patch.checking import setups
from trainer_fsdp_patch.checking.errors import CheckError

if TYPE_CHECKING:
    from trainer_fsdp_patch.testing.case import Setup

TIMEOUT = 900.0
"""Seconds after which `check` ends, where nothing else is asked for."""

HELP = "train a tiny adapter on two ranks, stock and patched, next to one process"

ABOUT = """Trains a tiny model with an adapter in each set-up of FSDP, stock and patched, next to one process.
A patched cell is right where losses, gradient norms and every adapter tensor are those of one process,
and where a rank takes no more than its plan says and than stock does.
On releases newer than any tested, it applies the patches that fit and judges by the same cells.
"""

MORE = """duration:
  about three seconds a set-up on two cores, and half a minute for all of them; no model hub is needed

exit codes:
  0    every patched cell is right
  1    a patched cell is wrong, or was not run within --timeout
  2    it could not run: an argument, a missing package, no room in the folder, no network on this machine
  130  interrupted; no process is left

example:
  python -m trainer_fsdp_patch check --only FSDP2 --method lora --json
"""


@dataclass(frozen=True)
class Options:
    """What `check` was asked for.

    Attributes:
        setups: to be trained.
        method: key of `setups.METHODS`.
        quantize: key of `setups.BASES`.
        ranks: number of ranks; 0 is one for each accelerator, and two at least.
        keep: folder for adapters, logs and the JSON, or None.
        timeout: seconds for everything.
        as_json: whether standard output gets JSON alone.
    """

    setups: tuple[Setup, ...] = setups.SETUPS
    method: str = "vera"
    quantize: str = "none"
    ranks: int = 0
    keep: Path | None = None
    timeout: float = TIMEOUT
    as_json: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `check`. `read` says what is wrong with a value, so that it is one line.

    Args:
        parser: of the command.
    """
    parser.description, parser.epilog = ABOUT, MORE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = ", ".join(f"'{setup.name}'" for setup in setups.SETUPS)
    parser.add_argument("--json", action="store_true", help="print JSON; progress goes to standard error")
    parser.add_argument(
        "--only", action="append", metavar="NAME", default=[], help=f"set-ups with this in their names, of {names}"
    )
    parser.add_argument("--method", metavar="NAME", default="vera", help=f"one of {', '.join(setups.METHODS)} (vera)")
    parser.add_argument(
        "--quantize", metavar="KIND", default="none", help=f"bitsandbytes' base: {', '.join(setups.BASES)} (none)"
    )
    parser.add_argument("--ranks", metavar="N", help="number of ranks (one for each accelerator, and two at least)")
    parser.add_argument("--keep", metavar="DIR", help="keep adapters, logs and the JSON in this new or empty folder")
    parser.add_argument(
        "--timeout", metavar="SECONDS", default=str(TIMEOUT), help=f"end after so many seconds ({TIMEOUT:.0f})"
    )


def read(given: argparse.Namespace) -> Options:
    """The options, from what argparse found.

    Args:
        given: with the arguments of `add_arguments`.

    Raises:
        CheckError: a value is of no use.
    """
    for name, known in (("method", setups.METHODS), ("quantize", setups.BASES)):
        if getattr(given, name) not in known:
            raise _refused(name, getattr(given, name), f"Choose one of {', '.join(known)}")
    ranks = 0 if given.ranks is None else _number(given.ranks)
    if given.ranks is not None and not (ranks >= 2 and ranks == int(ranks)):
        raise _refused("ranks", given.ranks, "Give a whole number, 2 or more")
    timeout = _number(given.timeout)
    if timeout <= 0:
        raise _refused("timeout", given.timeout, "Give a number of seconds above 0")
    if given.keep == "":
        raise _refused("keep", given.keep, "Give a folder")
    return Options(
        setups=setups.chosen(given.only),
        method=given.method,
        quantize=given.quantize,
        ranks=int(ranks),
        keep=None if given.keep is None else Path(given.keep),
        timeout=timeout,
        as_json=given.json,
    )


def _refused(name: str, value: str, remedy: str) -> CheckError:
    return CheckError(f"check --{name}", f"'{value}' was given", "Nothing was trained", remedy)


def _number(text: str) -> float:
    """The number that a text says; -1 where it is none, or not finite."""
    try:
        value = float(text)
    except ValueError:
        return -1
    return value if math.isfinite(value) else -1
