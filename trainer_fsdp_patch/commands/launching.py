"""`run`: patches a program and every Python below it, without a line in any of them."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer_fsdp_patch.errors import TrainerFsdpPatchError
from trainer_fsdp_patch.patching.awaiting import DISABLE

HELP = "run a script, a module or a program, patched"

SITE = Path(__file__).with_name("start")
"""Folder of the sitecustomize that calls `patch()`."""

CODE = ("-m", "-c")
"""Options of python's that say what to run."""

BUDGET = "TRAINER_FSDP_PATCH_BASE_BUDGET"

ABOUT = """Runs a program as it would run by itself, with `patch()` called in it and in every Python that it starts.
Nothing is edited. The program takes the place of this process, so that arguments, standard streams, signals, tracebacks
and exit codes are its own. A script that calls `patch()` itself is not patched twice.
"""

MORE = """what TARGET is:
  script.py        a Python script, as `python script.py` runs it
  -m module        a module, as `python -m module` runs it
  -c code          code, as `python -c code` runs it
  torchrun, ...    any other program, such as torchrun, accelerate or trl

exit codes:
  those of the program
  2    there is no such program, or an option is of no use; nothing was run

examples:
  python -m trainer_fsdp_patch run torchrun --nproc-per-node 2 train.py --lr 1e-4
  python -m trainer_fsdp_patch run --base-budget 25% accelerate launch train.py
  accelerate launch -m trainer_fsdp_patch run train.py
"""


class RunError(TrainerFsdpPatchError):
    """There is nothing that can be run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of `run`.

    Args:
        parser: of the command.
    """
    parser.description, parser.epilog = ABOUT, MORE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "%(prog)s [-h] [--disable NAMES] [--base-budget BUDGET] TARGET [ARGUMENTS ...]"
    parser.add_argument("--disable", metavar="NAMES", help=f"patches to leave out, as {DISABLE}; `all` is all")
    parser.add_argument("--base-budget", metavar="BUDGET", help=f"as {BUDGET}: 8GiB, 25%%, auto")
    parser.add_argument("target", metavar="TARGET", nargs="*", help="what to run, and its arguments")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of `run`, and the target with all that is its own; argparse would take a target's options.

    Args:
        words: behind `run`.
    """
    place = 0
    while place < len(words) and words[place].startswith("-") and words[place] not in ("--", *CODE):
        place += 2 if words[place] in ("--disable", "--base-budget") else 1
    return list(words[:place]), list(words[place:])


def run(given: argparse.Namespace) -> int:
    """Replace this process by the program.

    Args:
        given: with the arguments of `add_arguments`.

    Returns:
        Never.

    Raises:
        RunError: there is no such program.
        PlanError: the budget is none.
    """
    from trainer_fsdp_patch.patching import switches
    from trainer_fsdp_patch.planning import residence

    residence.check(given.base_budget)
    switches.left_out(given.disable or "")
    words = command(given.target)
    settings = {DISABLE: given.disable, BUDGET: given.base_budget}
    environment = patched(os.environ) | {name: value for name, value in settings.items() if value is not None}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(words[0], words, environment)
    except OSError as error:
        raise _refused(words[0], error.strerror or str(error)) from error


def command(target: Sequence[str]) -> list[str]:
    """What to execute.

    Args:
        target: script, `-m` and a module, `-c` and code, or a program; with its arguments.

    Raises:
        RunError: there is none, or this Python reads no environment.
    """
    words = list(target[1:] if target[:1] == ["--"] else target)
    if not words or (words[0] in CODE and len(words) == 1):
        raise _refused(" ".join(["run", *words]), "no script, module or program is named")
    path, program = Path(words[0]), shutil.which(words[0])
    if words[0] in CODE or path.suffix == ".py" or (path.exists() and program is None):
        if words[0] not in CODE and not path.exists():
            raise _refused(words[0], "there is no such file")
        return [*_python(), *words]
    if program is None:
        raise _refused(words[0], "there is no such program")
    return [program, *words[1:]]


def _python() -> list[str]:
    """This interpreter. Its options, such as -W error, hold for what takes its place."""
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise _refused(sys.executable, "its option -E, -I or -S keeps patch() out of what takes its place")
    return [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]


def patched(environment: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """The environment in which every Python patches itself.

    Args:
        environment: of this process. Its PYTHONPATH stays, behind one folder of ours.
    """
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    kept = [path for path in paths if path and path != str(SITE)]
    return {**environment, "PYTHONPATH": os.pathsep.join([str(SITE), *kept])}


def _refused(subject: str, found: str) -> RunError:
    return RunError(subject, found, "Nothing was run", "`python -m trainer_fsdp_patch run --help` has examples")
