"""Judges the releases that are installed: which seams moved, and which cells changed against the committed data.

    python tests/programs/newest.py [--markdown FILE] [--json FILE]

`nox -s newest` runs it in an environment of the newest of everything. Five parts follow each other: `seams`, `check`,
the scenarios of the stacks, the cells of `cover.py`, and the tests of the patches that none of these calls. One verdict
is printed for each package. It ends with 1 where a patch does not fit, or a cell or test is worse than it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

# As a program it finds what tests find by pytest's own path.
sys.path[:0] = [str(Path(__file__).parent.parent / name) for name in ("matrix", "helpers")]

from triples import last_line

from trainer_fsdp_patch import support, versions
from trainer_fsdp_patch.patching import registry, seams

ROOT = Path(__file__).parent.parent.parent
DATA = ROOT / "tests" / "data"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Change:
    """A cell that says something else than the committed data.

    Attributes:
        part: what ran it, such as "stacks".
        cell: its name.
        side: "stock" or "patched".
        before: what was wrong by the committed data, "" where it was right.
        now: what is wrong here.
    """

    part: str
    cell: str
    side: str
    before: str
    now: str

    @property
    def worse(self) -> bool:
        return self.side == "patched" and bool(self.now)

    @property
    def healed(self) -> bool:
        return self.side == "stock" and not self.now


@dataclass
class Report:
    """All that was found; `seconds` has the time of each part."""

    moves: list[seams.Move] = field(default_factory=list)
    aside: dict[str, str] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    cells: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Take the time of a part, and say that it begins."""
        sys.stderr.write(f"{name} ...\n")
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)

    def compare(self, part: str, cell: str, side: str, before: str, now: str) -> None:
        """Count a cell, and keep it where right has become wrong, or wrong right."""
        self.cells += 1
        if bool(before) != bool(now):
            self.changes.append(Change(part, cell, side, before, now))


def moved(report: Report) -> None:
    """Which seams have another body or signature, or are gone; and which patches stand aside."""
    from trainer_fsdp_patch.testing import targets

    targets.import_all()
    report.moves = [move for move in seams.moves() if move.state != "same"]
    registry.patch()
    report.aside = {state.name: state.reason for state in registry.status() if state.state == registry.FAILED}
    registry.unpatch()


def checked(report: Report) -> None:
    """The cells of `check`, each of which was right."""
    command = [sys.executable, "-m", "trainer_fsdp_patch", "check", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        rows = json.loads(done.stdout)["cells"]
    except (ValueError, KeyError):
        report.compare("check", "all", "patched", "", last_line(done.stderr))
        return
    for row in rows:
        report.compare("check", row["set-up"], "patched", "", row["patched"]["error"])


def stacked(report: Report) -> None:
    """The scenarios of the stacks, next to the record of the newest stack."""
    import stacks

    before = {row["scenario"]: row for row in json.loads((DATA / "stacks.json").read_text())[-1]["rows"]}
    for row in stacks.here("", stock=True)["rows"]:
        known = before.get(row["scenario"], {"stock": row["stock"], "patched": ""})
        for side in ("stock", "patched"):
            report.compare("stacks", row["scenario"], side, known[side], row[side])


def covered(report: Report) -> None:
    """The cells of the matrix that call what the stacks do not, next to the record of the matrix."""
    import cells

    wanted = [(item["method"], item["setup"]) for item in json.loads((DATA / "cover.json").read_text())["cells"]]
    before = {(row["method"], row["setup"]): row for row in json.loads((DATA / "matrix.json").read_text())}
    chosen = [cell for cell in cells.cells() if (cell[0], cell[1].name) in wanted]
    for row in cells.measured(chosen, cells.SIDES, jobs=1):
        known = before[row["method"], row["setup"]]
        for side in cells.SIDES:
            now = row.get("reference") or row[side]
            report.compare("matrix", f"{row['method']} {row['setup']}", side, known[side], now)


def tested(report: Report) -> None:
    """The own tests of the patches whose wrappers no cell calls."""
    names = json.loads((DATA / "cover.json").read_text())["tests"]
    files = [f"tests/patches/test_{name}.py" for name in names]
    options = ["-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    for line in lines:
        name, _, said = line.partition(" - ")
        report.compare("tests", name.split(" ", 1)[1], "patched", "", said or "failed")
    report.cells += len(files) if not lines else 0
    if done.returncode and not lines:
        report.compare("tests", "all", "patched", "", last_line(done.stdout))


PARTS: dict[str, Callable[[Report], None]] = {
    "seams": moved,
    "check": checked,
    "stacks": stacked,
    "matrix": covered,
    "tests": tested,
}


def judged() -> Report:
    """Run every part."""
    report = Report()
    for name, run in PARTS.items():
        with report.part(name):
            run(report)
    return report


def verdict(report: Report, package: str) -> str:
    """One line for a package; a cell that is worse is the fault of each that is newer than tested."""
    here = [move for move in report.moves if move.seam.split(".")[0] == package]
    broken = [move for move in here if seams.is_broken(move)]
    worse = sum(change.worse for change in report.changes)
    healed = sum(change.healed for change in report.changes)
    if broken:
        return f"broken: {', '.join(f'{move.seam} {move.state}' for move in broken)}"
    if not versions.newer_than_tested(package):
        return "tested before"
    if worse:
        return f"wrong: {worse} cells are worse"
    said = f"right; {len(here)} seams moved, read their bodies" if here else "right; no seam moved"
    return f"{said}; stock has healed in {healed} cells" if healed else said


def markdown(report: Report) -> str:
    """The verdicts, the seams that moved and the cells that changed, as an issue or a terminal shows them."""
    lines = ["| package | installed | newest tested | seams moved | verdict |", "| --- | --- | --- | --- | --- |"]
    for package in PACKAGES:
        count = sum(move.seam.split(".")[0] == package for move in report.moves)
        releases = f"{versions.installed(package)} | {support.NEWEST[package]}"
        lines.append(f"| {package} | {releases} | {count} | {verdict(report, package)} |")
    lines.append("")
    lines += [f"- seam {move.seam}: {move.state} {move.detail}".rstrip() for move in report.moves]
    lines += [f"- patch {name} stands aside: {reason}" for name, reason in report.aside.items()]
    for change in report.changes:
        said = f"{change.before or 'right'} -> {change.now or 'right'}"
        lines.append(f"- {change.part} {change.cell}, {change.side}: {said}")
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.seconds.items())
    total = sum(report.seconds.values())
    lines.append(f"\n{report.cells} cells, {len(report.changes)} changed; {total:.0f} s: {spent}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    parser.add_argument("--json", type=Path, help="write all that was found to this file")
    given = parser.parse_args()
    report = judged()
    text = markdown(report)
    sys.stdout.write(text)
    if given.markdown:
        given.markdown.write_text(text)
    if given.json:
        given.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
    return int(bool(report.aside) or any(change.worse for change in report.changes))


if __name__ == "__main__":
    sys.exit(main())
