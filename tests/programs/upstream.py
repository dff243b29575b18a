"""Runs tests of accelerate, peft or transformers stock and with patch() on, and prints those whose outcome differs.

    python tests/programs/upstream.py accelerate-1.15.0/tests -k "not slow"

Each file gets a pytest process of its own, stock and then patched; patch() is called in every Python process that it
starts, by a `sitecustomize` in a temporary folder. The stock run has such a folder too, without that call. What counts
is whether a test passes, is skipped, fails or hangs, and by which exception. A test that differs is run again
both ways, alone; one that differs only in the company of its file has its file run again. What is left is different.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from runs import ABSENT, REFUSED, Portion, Result, Results, Side, outcomes

NOTE = """\
exit codes:
  0  every test has the same outcome both ways, or is flaky
  1  a test's outcome differs
  2  nothing was compared, not all of it (Ctrl-C), or the patched run was not patched

What follows `--` goes to pytest. The tests' own addopts are left out: they may name plugins that are not installed.
HF_HUB_OFFLINE=1 is set unless the environment has the variable; tests that need the hub then fail both ways.

example:
  pip download --no-binary :all: --no-deps accelerate==1.15.0 && tar xf accelerate-1.15.0.tar.gz
  python tests/programs/upstream.py accelerate-1.15.0/tests/test_optimizer.py --timeout 60 -- -W ignore
"""


class Usage(Exception):  # noqa: N818
    """Nothing can be compared; the text says why."""


@dataclass
class Comparison:
    """Outcomes of one file, stock and patched.

    Attributes:
        stock, patched: of the first run.
        different: tests that differ however often they are run; flaky: those that differ now and then.
    """

    stock: Results
    patched: Results
    different: list[str] = dataclasses.field(default_factory=list)
    flaky: list[str] = dataclasses.field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return list(self.stock | self.patched)

    def pair(self, name: str) -> tuple[Result, Result]:
        return self.stock.get(name, ABSENT), self.patched.get(name, ABSENT)

    def differing(self) -> list[str]:
        return [name for name in self.names if _differ(*self.pair(name))]


def _differ(stock: Result, patched: Result) -> bool:
    return stock.outcome != patched.outcome


def compare(sides: tuple[Side, Side], portion: Portion, retries: int) -> Comparison:
    """Run a file both ways, and what differs again.

    Args:
        sides: stock and patched.
        portion: the file.
        retries: how often a test that differs is run again.
    """
    first = Comparison(*(outcomes(side, portion) for side in sides))
    suspects = first.differing()
    alone = list(suspects)
    for _ in range(retries):
        if alone:
            again = Comparison(*(outcomes(side, portion, alone) for side in sides))
            alone = [name for name in alone if _differ(*again.pair(name))]
    company = [name for name in suspects if name not in alone]
    if company:
        # What an earlier test of the file leaves behind may be what a patch adds.
        again = Comparison(*(outcomes(side, portion) for side in sides))
        company = [name for name in company if _same(first.pair(name), again.pair(name))]
    first.different = [name for name in suspects if name in alone or name in company]
    first.flaky = [name for name in suspects if name not in first.different]
    return first


def _same(one: tuple[Result, Result], other: tuple[Result, Result]) -> bool:
    return [item.outcome for item in one] == [item.outcome for item in other]


def files(paths: list[Path]) -> list[Path]:
    """Test files of paths, in order.

    Raises:
        Usage: a path does not exist.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise Usage(f"{path} does not exist")
        inside = sorted({*path.rglob("test_*.py"), *path.rglob("*_test.py")}) if path.is_dir() else [path]
        found |= dict.fromkeys(item.resolve() for item in inside)
    return list(found)


def root_of(path: Path) -> Path:
    """Folder that upstream runs pytest in: the project's, or else the file's own."""
    marks = ("pyproject.toml", "setup.py", "setup.cfg", "pytest.ini", "tox.ini")
    return next((item for item in path.parents if any((item / mark).is_file() for mark in marks)), path.parent)


def counts(results: Results) -> str:
    found = Counter(result.outcome.partition(" ")[0] for result in results.values())
    return ", ".join(f"{number} {name}" for name, number in sorted(found.items())) or "no tests"


def table(title: str, rows: list[tuple[str, Result, Result]]) -> Table:
    result = Table(title=title, title_justify="left", show_lines=True)
    result.add_column("test", overflow="fold")
    for column in ("stock", "patched"):
        result.add_column(column, overflow="fold")
    for name, *pair in rows:
        result.add_row(escape(name), *(escape(f"{item.outcome}\n{item.detail[:300]}".strip()) for item in pair))
    return result


def report(console: Console, found: dict[str, Comparison], processes: int) -> int:
    """Print the tables and the counts; returns the number of tests that differ."""
    different, flaky = (
        [(name, *item.pair(name)) for item in found.values() for name in getattr(item, kind)]
        for kind in ("different", "flaky")
    )
    if flaky:
        console.print(table("Flaky: not the same each time", flaky))
    if different:
        console.print(table("Different", different))
    for side in ("stock", "patched"):
        console.print(f"{side}: {counts({k: v for item in found.values() for k, v in getattr(item, side).items()})}")
    total = sum(len(item.names) for item in found.values())
    console.print(f"{total} tests, {len(different)} differ, {len(flaky)} flaky; patch() in {processes} processes")
    return len(different)


def as_json(found: dict[str, Comparison]) -> dict[str, Any]:
    """What `--json` writes: every test by file, and the errors of those that differ."""
    tests = {name: [side.outcome for side in item.pair(name)] for item in found.values() for name in item.names}
    differing = {
        kind: {name: [side.text for side in item.pair(name)] for item in found.values() for name in getattr(item, kind)}
        for kind in ("different", "flaky")
    }
    return {"tests": tests, **differing}


def parse(arguments: list[str]) -> argparse.Namespace:
    theirs: list[str] = []
    if "--" in arguments:
        place = arguments.index("--")
        arguments, theirs = arguments[:place], arguments[place + 1 :]
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] PATH... [-- PYTEST_ARGUMENTS...]",
        description=__doc__,
        epilog=NOTE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="folder of tests, or a file")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="only tests that match, as pytest has it")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a test is ended (300)")
    parser.add_argument("--retries", type=int, default=2, help="how often a test that differs is run again (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every test's outcomes go here")
    given = parser.parse_args(arguments)
    given.extra = [*(["-k", given.k] if given.k else []), *theirs]
    return given


def each(given: argparse.Namespace, sides: tuple[Side, Side], console: Console) -> Iterator[tuple[str, Comparison]]:
    """Compare file by file, and print the count of each.

    Raises:
        Usage: the patched run was not patched.
    """
    for path in files(given.paths):
        portion = Portion(path, root_of(path), given.extra, given.timeout)
        item = compare(sides, portion, given.retries)
        line = f"{escape(portion.name)}: {counts(item.stock)}; {len(item.different)} differ"
        console.print(line, highlight=False)
        if item.names and not sides[1].log.read_text():
            raise Usage("patch() was called in no process of the patched run: is wrapt installed?")
        yield str(path), item


def run(given: argparse.Namespace, console: Console) -> int:
    """Compare all files, and say what was found.

    Raises:
        Usage: nothing was compared, or the patched run was not patched.
    """
    found: dict[str, Comparison] = {}
    interrupted = False
    with tempfile.TemporaryDirectory() as folder:
        sides = (Side(Path(folder) / "stock", patched=False), Side(Path(folder) / "patched", patched=True))
        for side in sides:
            side.prepare()
        try:
            for path, item in each(given, sides, console):
                found[path] = item
        except KeyboardInterrupt:
            interrupted = True
            console.print("Interrupted: what follows is of the files above.")
        processes = len(set(sides[1].log.read_text().split()))
    if not any(item.names for item in found.values()):
        raise Usage("no test was found")
    refusals = [result for item in found.values() for name in item.names for result in item.pair(name)]
    if all(result.outcome == REFUSED for result in refusals):
        raise Usage(f"pytest refuses every file: {refusals[0].text}")
    if given.json:
        given.json.write_text(json.dumps(as_json(found), indent=1) + "\n")
    differing = report(console, found, processes)
    return 2 if interrupted else int(differing > 0)


def main(arguments: list[str]) -> int:
    given = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        return run(given, console)
    except Usage as error:
        Console(stderr=True).print(escape(str(error)))
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
