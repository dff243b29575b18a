"""What FSDP does to adapters on the accelerator that is here: stock, patched, and one process on the same device.

    python tests/programs/gpu.py [--device cpu] [--ranks N] [--only TEXT] [--json FILE]

Each scenario is trained by the Trainer under FSDP1 and FSDP2, stock and patched. A cell is right where its steps and
its saved adapter equal those of one process. The table has peak memory and the median time of a step, and what a rank
holds of parameters between steps. No model hub is asked. It takes 8 minutes at most: what has not begun after 7 is
skipped. The result is 0 where every patched run is right, 1 where one is not, and 2 where nothing could be run.
`--device cpu` runs the same on gloo ranks, at tiny size. `nox -s gpu` runs it in an environment of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# As a program it finds what tests find by pytest's own path.
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from gpu_scenarios import SCENARIOS, Scenario
from workers import Pool

from trainer_fsdp_patch import devices
from trainer_fsdp_patch.errors import TrainerFsdpPatchError
from trainer_fsdp_patch.testing import case
from trainer_fsdp_patch.testing.case import Outcome

PROGRAM = Path(__file__).with_name("gpu_rank.py")
SIDES = ("stock", "patched")
LATE, END = 420.0, 470.0
"""Seconds after which no scenario is begun, and after which one that runs is ended."""
ROOM = 2**30
"""Bytes that the base, the adapters and what torch.compile keeps may take on disk."""
SHOWN = 90
"""Characters of an error in the table."""
HEADS = ("scenario", "stock", "patched", "error", "peak MiB", "ms a step", "MiB of parameters at rest")

Row = dict[str, Any]


class Clock:
    """Says when there is no time left."""

    def __init__(self, late: float = LATE, end: float = END) -> None:
        self.began, self.late_after, self.end = time.monotonic(), late, end

    def late(self) -> bool:
        """Whether nothing more may be begun."""
        return time.monotonic() - self.began >= self.late_after

    def left(self) -> float:
        """Seconds until what runs is ended."""
        return max(0.0, self.began + self.end - time.monotonic())


class Session:
    """Trains scenarios, and keeps what one process gave for both versions of FSDP.

    Args:
        folder: for the base, the adapters and the logs.
        device: "cpu", or "accelerator" for the one that is here.
        ranks: number of them; 0 is two where there are two devices, else one.
        clock: of the budget.

    Raises:
        TrainerFsdpPatchError: there is no such device, or not so many.
    """

    def __init__(self, folder: Path, device: str, ranks: int = 0, clock: Clock | None = None) -> None:
        self.folder, self.clock = folder, clock or Clock()
        self.references: dict[str, Outcome] = {}
        free = shutil.disk_usage(folder).free
        if free < ROOM:
            raise TrainerFsdpPatchError(
                str(folder), f"{free / 2**20:.0f} MiB are free", f"A run may need {ROOM // 2**20}",
                "Free some, or set TMPDIR to a folder on another disk",
            )  # fmt: skip
        environment = {
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONWARNINGS": "ignore", "TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
        }  # fmt: skip
        if device == "cpu":
            environment |= dict.fromkeys(devices.VISIBLE.values(), "")
        self.pool = Pool(PROGRAM, environment, folder / "logs")
        try:
            self.found = self._probe(device)
            there = len(self.found["devices"]) or (os.cpu_count() or 1)
            self.ranks = ranks or (min(2, len(self.found["devices"])) or 1)
            if self.ranks > there:
                raise TrainerFsdpPatchError(
                    f"--ranks {ranks}", f"{there} devices are here", "Each rank needs one", f"Give {there} or fewer"
                )
            # One that imports while another trains must not take its core.
            self.pool.spare = self.ranks if (os.cpu_count() or 1) >= 4 * self.ranks else 0
            self.size = "TINY" if device == "cpu" else "SMALL"
            self._required({"what": "base", "size": self.size, "folder": str(folder / "base")})
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers that wait."""
        self.pool.__exit__()

    def _probe(self, device: str) -> dict[str, Any]:
        found = self._required({"what": "probe"}).extra
        if (found["kind"] == "cpu") != (device == "cpu"):
            raise TrainerFsdpPatchError(
                "tests/programs/gpu.py", f"torch {found['packages']['torch']} sees no accelerator that can train ranks"
                if device != "cpu" else f"{found['kind']} devices that cannot be hidden from it", "Nothing was run",
                "Run it where torch.accelerator.is_available() is true, or add `--device cpu` (nox: after `--`)"
                if device != "cpu" else "Leave `--device cpu` out",
            )  # fmt: skip
        return found

    def _required(self, job: dict[str, Any]) -> Outcome:
        [outcome] = self.pool.run(job, ranks=0, seconds=self.clock.left())
        if outcome.error:
            raise TrainerFsdpPatchError(
                f"{job['what']} in a process of its own", outcome.error, "Nothing was run", "Mend this, and try again"
            )
        return outcome

    def rows(self, only: str, say: Callable[[str], object]) -> list[Row]:
        """One row for each scenario and version of FSDP.

        Args:
            only: those whose name contains this.
            say: gets a line for each, as soon as it has ended.
        """
        rows = []
        for scenario, fsdp in chosen(only):
            rows.append(self.row(scenario, fsdp))
            say(" ".join(cells(rows[-1])[:4]))
        return rows

    def row(self, scenario: Scenario, fsdp: int) -> Row:
        """One scenario: what is wrong with each side, "" where it is right; or why it was skipped."""
        row: Row = {"scenario": scenario.name, "fsdp": fsdp}
        lacks = scenario.lacks(self.found, fsdp)
        lacks = lacks or ("" if fsdp in self.found["fsdp"] else f"these releases have no FSDP{fsdp} on these devices")
        if lacks or self.clock.late():
            return {**row, "skipped": lacks or "time"}
        began = time.monotonic()
        one = self.reference(scenario)
        if one.error:
            return {**row, "skipped": "time" if self.clock.late() else f"one process: {one.error}"}
        setup = scenario.of(fsdp, self.found["kind"])
        row["one"] = numbers(one)
        for side in SIDES:
            run = case.merged(self.run(scenario, side, fsdp))
            verdict = judged(run, one, setup)
            if self.clock.left() <= 0:
                return {**row, "skipped": "time"}
            error = verdict.worst if math.isfinite(verdict.worst) else None
            row[side] = {"wrong": verdict.error, "error": error, **numbers(run)}
        return {**row, "took": time.monotonic() - began}

    def reference(self, scenario: Scenario) -> Outcome:
        """What one process gives on the same device; it is trained once."""
        if scenario.name not in self.references:
            [outcome] = self.run(scenario, "one", 0)
            if not outcome.error and not trained(outcome):
                outcome.error = "its adapter is not trained"
            self.references[scenario.name] = outcome
        return self.references[scenario.name]

    def run(self, scenario: Scenario, side: str, fsdp: int) -> list[Outcome]:
        """Train one side of a scenario; an outcome for each rank."""
        folder = self.folder / f"{scenario.name} {side} {fsdp}"
        folder.mkdir(exist_ok=True)
        job = {
            "what": "train", "scenario": scenario.name, "side": side, "fsdp": fsdp, "ranks": self.ranks,
            "size": self.size, "base": str(self.folder / "base"), "folder": str(folder),
        }  # fmt: skip
        seconds = min(scenario.seconds, self.clock.left())
        return self.pool.run(job, ranks=0 if side == "one" else self.ranks, seconds=seconds)


def chosen(only: str) -> Iterator[tuple[Scenario, int]]:
    """Scenarios and versions of FSDP whose name contains a text."""
    for scenario in SCENARIOS:
        yield from ((scenario, fsdp) for fsdp in (1, 2) if only.lower() in name(scenario.name, fsdp).lower())


def name(scenario: str, fsdp: int) -> str:
    """Of a row."""
    return f"{scenario}, FSDP{fsdp}"


def trained(outcome: Outcome) -> bool:
    """Whether a run has changed its adapter."""
    first, last = outcome.steps[0], outcome.steps[-1]
    return any(not first[key].equal(last[key]) for key in first)


def judged(run: Outcome, one: Outcome, setup: case.Setup) -> case.Verdict:
    """Whether ranks trained and saved what one process did."""
    if run.error:
        return case.Verdict(run.error, math.nan)
    # Where the scaler skips a step, its norm is no number; both skip the same ones.
    finite = [[math.isfinite(norm) for norm in outcome.norms] for outcome in (run, one)]
    if finite[0] != finite[1]:
        return case.Verdict("it skipped other steps than one process", math.nan)
    ours, theirs = (
        dataclasses.replace(outcome, norms=[norm for norm in outcome.norms if math.isfinite(norm)])
        for outcome in (run, one)
    )
    return case.compare(ours, theirs, setup)


def numbers(outcome: Outcome) -> Row:
    """What a run took of a rank: bytes, and seconds of a step."""
    seconds = outcome.extra.get("seconds")
    return {
        "peak": outcome.extra.get("peak"),
        "peak_start": outcome.extra.get("peak_start"),
        "held": outcome.extra.get("held"),
        "seconds": statistics.median(seconds) if seconds else None,
        "rest": outcome.footprint.rest if outcome.footprint else None,
        "traceback": outcome.extra.get("traceback"),
    }


def right(row: Row) -> bool:
    """Whether a row's patched run is right, which it is not where it was skipped."""
    return "skipped" not in row and not row["patched"]["wrong"]


def cells(row: Row) -> list[str]:
    """A row of the table, with HEADS."""
    title = name(row["scenario"], row["fsdp"])
    if "skipped" in row:
        return [title, "", _short(f"skipped: {row['skipped']}"), "", "", "", ""]
    sides = [row[side] for side in SIDES]
    worst = sides[1]["error"]
    return [
        title,
        *(_short(side["wrong"]) or "right" for side in sides),
        "" if worst is None else f"{worst:.1e}",
        _both(sides, "peak", 2**-20),
        _both(sides, "seconds", 1e3),
        _both(sides, "rest", 2**-20),
    ]


def _short(text: str) -> str:
    """The begin of an error; the file of the result has it all."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _both(sides: list[Row], key: str, unit: float) -> str:
    """Stock's number and the patched one; a run that has failed before has none."""
    return " -> ".join("none" if side[key] is None else f"{side[key] * unit:.1f}" for side in sides)


def card(found: dict[str, Any]) -> str:
    """The devices in words, with driver and releases."""
    names = [device["name"] for device in found["devices"]] or ["CPU"]
    counted = [f"{names.count(each)} x {each}" for each in dict.fromkeys(names)]
    releases = {**found["runtimes"], **{key: value for key, value in found["packages"].items() if value}}
    return ", ".join([*counted, *(f"{key} {value}" for key, value in releases.items())])


def show(found: dict[str, Any], ranks: int, rows: list[Row]) -> None:
    """Print the table, and how many patched runs are right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{found['backend']}, ranks: {ranks}; next to one process, stock -> patched", title_justify="left"
    )
    for head in HEADS:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*cells(row))
    console = Console(width=None if Console().is_terminal else 140, markup=False, highlight=False)
    console.print(card(found), soft_wrap=True)
    console.print(table)
    ran = [row for row in rows if "skipped" not in row]
    console.print(f"{sum(map(right, ran))} of {len(ran)} right, {len(rows) - len(ran)} skipped")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """What was asked for; a wrong word ends the program with 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("accelerator", "cpu"), default="accelerator")
    parser.add_argument("--ranks", type=int, default=0, help="two where there are two devices, else one")
    parser.add_argument("--only", default="", help="keep scenarios whose name contains this")
    parser.add_argument("--json", type=Path, default=ROOT / ".nox" / "gpu.json", help="file of the result")
    given = parser.parse_args(words)
    if given.ranks < 0:
        parser.error(f"--ranks {given.ranks}: it is below 0. No rank would run. Give 1 or more.")
    if not list(chosen(given.only)):
        names = ", ".join(scenario.name for scenario in SCENARIOS)
        parser.error(
            f"--only {given.only}: no scenario has this in its name. Nothing would run. The names are {names}."
        )
    return given


def main() -> int:
    given = arguments()
    clock = Clock()
    try:
        # Before minutes of training: the file has to be writable.
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text("{}\n")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            session = Session(Path(folder), given.device, given.ranks, clock)
            try:
                rows = session.rows(given.only, lambda line: print(line, file=sys.stderr, flush=True))
            finally:
                session.close()
    except (TrainerFsdpPatchError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: its ranks have been ended", file=sys.stderr)
        return 130
    result = {"found": session.found, "ranks": session.ranks, "seconds": END - clock.left(), "rows": rows}
    given.json.write_text(json.dumps(result, indent=1) + "\n")
    show(session.found, session.ranks, rows)
    ran = [row for row in rows if "skipped" not in row]
    return 0 if ran and all(map(right, ran)) else 1


if __name__ == "__main__":
    sys.exit(main())
