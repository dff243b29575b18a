"""A parser whose errors are one line, and what the help of every command has."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

PROGRAM = "python -m trainer_fsdp_patch"


class Parser(argparse.ArgumentParser):
    """argparse's, which says an error in one line and where the help is."""

    def error(self, message: str) -> NoReturn:
        """Write one line and end with exit code 2.

        Args:
            message: argparse's own, such as "unrecognized arguments: --yaml".
        """
        sys.stderr.write(f"{self.prog}: {message.rstrip('.')}. Nothing was done. `{self.prog} --help` has the usage.\n")
        sys.exit(2)


def describe(parser: argparse.ArgumentParser, about: str, duration: str, codes: str, example: str) -> None:
    """Give a command what its help says beyond its arguments.

    Args:
        parser: of the command.
        about: what it does.
        duration: how long it takes.
        codes: its exit codes, one a line.
        example: command lines behind the program's name, one a line.
    """
    lines = [f"  {PROGRAM} {line}" for line in example.splitlines()]
    indented = "\n".join(f"  {line}" for line in codes.splitlines())
    parser.description = about
    parser.epilog = f"duration:\n  {duration}\n\nexit codes:\n{indented}\n\nexample:\n" + "\n".join(lines)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
