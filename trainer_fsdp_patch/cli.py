"""Repairs PEFT adapters under FSDP with the Transformers Trainer, whatever versions are installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import trainer_fsdp_patch
from trainer_fsdp_patch import versions
from trainer_fsdp_patch.checking import options
from trainer_fsdp_patch.commands import launching, parsing, saved, states
from trainer_fsdp_patch.errors import TrainerFsdpPatchError, message
from trainer_fsdp_patch.reporting import options as reporting

SEAMS = "for maintainers: what moved since the newest tested releases"
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class Command(NamedTuple):
    """One command: a line of help, its arguments, what it does, and whether that needs torch and the others."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    needs_targets: bool = False


def _check(given: argparse.Namespace) -> int:
    from trainer_fsdp_patch.checking import run

    return run.run(options.read(given))


def _plan(given: argparse.Namespace) -> int:
    from trainer_fsdp_patch.reporting import run

    return run.run(given)


def _seams(given: argparse.Namespace) -> int:
    from trainer_fsdp_patch.patching import seams
    from trainer_fsdp_patch.testing import targets

    targets.import_all()
    if given.record:
        seams.write_record()
    return seams.report()


def _add_seams(parser: argparse.ArgumentParser) -> None:
    parsing.describe(
        parser,
        "For maintainers: compares the functions that the patches wrap with those of the newest tested releases.",
        "as long as the imports of torch and the others take",
        "0    every wrapped function has the signature that its wrapper knows\n1    one has moved",
        "seams",
    )
    parser.add_argument("--record", action="store_true", help="write the installed releases as the tested ones")


COMMANDS = {
    "run": Command(launching.HELP, launching.add_arguments, launching.run),
    "check": Command(options.HELP, options.add_arguments, _check, needs_targets=True),
    "plan": Command(reporting.HELP, reporting.add_arguments, _plan, needs_targets=True),
    "status": Command(states.HELP, states.add_arguments, states.run),
    "verify": Command(saved.VERIFY, saved.add_verify, saved.verify),
    "repair": Command(saved.REPAIR, saved.add_repair, saved.repair),
    "seams": Command(SEAMS, _add_seams, _seams, needs_targets=True),
}
"""In the order in which the help lists them."""


def parser() -> argparse.ArgumentParser:
    """Every command with its arguments."""
    program = parsing.Parser(prog=parsing.PROGRAM, description=__doc__)
    program.add_argument("--version", action="version", version=f"trainer_fsdp_patch {trainer_fsdp_patch.__version__}")
    commands = program.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        made = commands.add_parser(name, help=command.help)
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.arguments(made)
    return program


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What a command line asks for.

    Args:
        argv: arguments behind the program's name.

    Raises:
        SystemExit: with 2 where it is of no use, with 0 where it asks for help or the version.
    """
    own = list(argv)
    target: list[str] = []
    if own[:1] == ["run"]:
        own, target = launching.split(own[1:])
        own = ["run", *own]
    given = parser().parse_args(own)
    if target:
        given.target = target
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments behind the program's name; None takes those of the process.

    Returns:
        The exit code, which `COMMAND --help` explains: 2 where nothing could be done.
    """
    given = parse(sys.argv[1:] if argv is None else argv)
    if given.command is None:
        parser().print_help()
        return 0
    command = COMMANDS[given.command]
    lacking = versions.missing() if command.needs_targets else []
    if lacking:
        found = f"{' and '.join(lacking)} not installed"
        sys.stderr.write(message(given.command, found, "Nothing was done", "Install what your project pins") + "\n")
        return 2
    try:
        return command.run(given)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if given.debug:
            raise
        known = isinstance(error, (TrainerFsdpPatchError, OSError))
        text = str(error) if known else f"{type(error).__name__}: {error}"
        more = "" if isinstance(error, TrainerFsdpPatchError) else f". `{given.command} --debug` shows where."
        sys.stderr.write(f"{' '.join(text.split())}{more}\n")
        return 2
