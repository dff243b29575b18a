"""Cases of public reports: what a user does, in one process and on two ranks, stock beside patched.

tests/reports/ has them, one file a kind. `python tests/programs/cases.py --record` runs all of them and writes what
came out to tests/data/cases.json, with `--missing` only those that are not there; `--markdown` prints docs/cases.md
from that.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# As a program it finds what tests find by pytest's own path.
sys.path[:0] = [str(Path(__file__).parent.parent / name) for name in ("matrix", "helpers")]

import pytest
from cells import METHODS, Bench, reference_of
from faults import FLAVOURS

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.files import reading
from trainer_fsdp_patch.names import canonical, unwrap
from trainer_fsdp_patch.testing import forks, trial
from trainer_fsdp_patch.testing.case import Outcome, Setup

REPORTS = Path(__file__).parent.parent / "reports"
DATA = Path(__file__).parent.parent / "data" / "cases.json"
BY_HAND = Path(__file__).parent.parent / "data" / "by_hand.json"
"""What no test holds, with the reason."""

PAGE = Path(__file__).parent.parent.parent / "docs" / "cases.md"
Found = dict[str, Any]
FSDP1, FSDP2, DDP = Setup("FSDP1", fsdp=1), Setup("FSDP2"), Setup("DDP", fsdp=0)

EMPTY = "/file: 8 of "
"""How peft 0.21 ends on FSDP1's names; test_peft_v0_21_state_dict_names.py holds it, so cases do not run it again."""

HUNG = "hung"
"""Stock waits for ever. That is recorded and not run again."""


@dataclass(frozen=True, eq=False)
class Case:
    """One report.

    Attributes:
        name: a few words, for the table.
        link: of the report or of the code that does so.
        does: what the user does, in a sentence.
        action: does it in each rank; what it returns is compared with one process.
        setups: on which it is run.
        stock: by set-up, a part of how stock differs from one process; it is right where nothing stands.
        changes: to the TrainingArguments.
        missing: packages without which it is not run.
        needs: a requirement, such as "transformers>=5.0", of what upstream can do at all.
        always: whether the suite runs it without --long.
        both: whether it does so on every set-up, and not only on one that says enough.
        alike: whether no plan is made, so that patched has to end as stock does, right or wrong.
        first: what is run before, and on which set-up, None for the same one; its folder is the scene's `before`.
    """

    name: str
    link: str
    does: str
    action: Callable[[Scene], Found]
    setups: tuple[Setup, ...] = (FSDP1, FSDP2)
    stock: dict[str, str] = field(default_factory=dict)
    changes: Found = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    needs: str = ""
    always: bool = True
    both: bool = False
    alike: bool = False
    first: tuple[Case, Setup] | None = None


class Scene:
    """What an action works with, in a rank.

    Args:
        setup: the set-up; base: folder of the base model; folder: of the case.
        ranks: number of them; rank: this one.
        given: TrainingArguments.
    """

    def __init__(self, setup: Setup, base: str, folder: Path, ranks: int, rank: int, given: Any) -> None:
        self.setup, self.base, self.folder, self.ranks, self.rank = setup, base, folder, ranks, rank
        self.given = given
        self.before = _before(folder)

    def load(self, kind: Any = None) -> Any:
        """The base model."""
        return trial.load_base(self.base, self.setup, kind=kind)

    def model(self, configure: Any = METHODS["lora"], *, load: Any = None, nudge: bool = True) -> Any:
        """The base with an adapter, of which no tensor is zero."""
        import torch

        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = configure(load() if load else self.load())
        if nudge:
            trial.nudge(model)
        return model

    def rows(self, *, even: bool = False, steps: int = trial.STEPS) -> list[Found]:
        """Data for so many steps."""
        return trial.dataset(steps * trial.BATCH * self.setup.accumulation, even=even)

    def trainer(self, model: Any = None, kind: Any = None, **keywords: Any) -> Any:
        """A Trainer, or a subclass of it, that prints nothing."""
        from transformers import PrinterCallback, Trainer

        keywords = {"args": self.given, "train_dataset": self.rows(), **keywords}
        trainer = (kind or Trainer)(model=self.model() if model is None else model, **keywords)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def trained(self, trainer: Any, **keywords: Any) -> Found:
        """Train, and give the losses and norms that the Trainer has logged."""
        trainer.train(**keywords)
        found: Found = {}
        for entry in trainer.state.log_history:
            for name in ("loss", "grad_norm", "eval_loss"):
                if name in entry:
                    found.setdefault(name, []).append(entry[name])
        return found

    def written(self, folder: str | Path = "") -> Found:
        """Tensors of an adapter's file below the case's folder, on the first rank once all are there."""
        self.wait()
        if self.rank:
            return {}
        file = reading.adapter_file(self.folder / folder)
        return {} if file is None else {key: tensor.clone() for key, tensor in reading.read_tensors(file).items()}

    def wait(self) -> None:
        """For all ranks."""
        import torch

        if self.ranks > 1:
            torch.distributed.barrier()


def trainable(model: Any) -> Found:
    """What trains of a model, by canonical name."""
    return {
        canonical(name): parameter.detach().clone()
        for name, parameter in unwrap(model).named_parameters()
        if parameter.requires_grad
    }


def _before(folder: Path) -> Path:
    return folder.parent / f"{folder.name}-before"


def work(case: Case, setup: Setup, base: str, folder: str, ranks: int, patched: bool, rank: int) -> Outcome:
    """Do it in this rank."""
    given = trial.enter(setup, folder, ranks, patched=patched)
    for name, value in case.changes.items():
        assert hasattr(given, name), name
        setattr(given, name, value)
    return Outcome(extra={"found": case.action(Scene(setup, base, Path(folder), ranks, rank, given))})


def run(case: Case, setup: Setup, base: str, folder: Path, *, patched: bool) -> list[Outcome]:
    """Run a case, and what comes before it, on ranks of their own."""
    folder.mkdir(parents=True)
    if case.first:
        first, on = case.first
        outcomes = run(first, on if setup.ranks > 1 else reference_of(on), base, _before(folder), patched=patched)
        if any(outcome.error for outcome in outcomes):
            return outcomes
    return forks.launch(work, case, setup, base, str(folder), setup.ranks, patched, ranks=setup.ranks)


def fault(outcomes: list[Outcome], one: Outcome, setup: Setup) -> str:
    """How the first rank's result differs from one process, or the error of a rank; "" where it is right."""
    errors = [outcome.error for outcome in outcomes if outcome.error]
    if errors:
        # Where one rank fails, the others say that they waited for it.
        waiting = ("hung", "RankError", "Connection closed", "Connection reset")
        return next((error for error in errors if not any(word in error for word in waiting)), errors[0])
    return differs(outcomes[0].extra["found"], one.extra["found"], setup.tolerance, "")


def differs(ours: Any, one: Any, tolerance: float, name: str) -> str:
    """Where two results are not alike: the first place that has other keys, another shape or another value."""
    import torch

    if isinstance(one, dict):
        other = sorted(set(ours) ^ set(one))
        if other:
            missing = sum(key in one for key in other)
            return f"{name}: {missing} of {len(one)} keys missing, {len(other) - missing} foreign, such as {other[0]}"
        pairs: Iterator[tuple[Any, Any, Any]] = ((key, ours[key], one[key]) for key in one)
    elif isinstance(one, (list, tuple)):
        if len(ours) != len(one):
            return f"{name}: {len(ours)} entries instead of {len(one)}"
        pairs = ((place, *pair) for place, pair in enumerate(zip(ours, one, strict=True)))
    elif isinstance(one, torch.Tensor):
        if type(ours) is not type(one):
            return f"{name} is a {type(ours).__name__} instead of a {type(one).__name__}"
        if ours.shape != one.shape or ours.dtype != one.dtype:
            return f"{name} is {ours.dtype} {list(ours.shape)} instead of {one.dtype} {list(one.shape)}"
        off = float((ours.double() - one.double()).norm()) / max(float(one.double().norm()), 1e-12)
        return "" if off <= tolerance else f"{name} is off by {off:.1e}"
    elif isinstance(one, float):
        return "" if math.isclose(ours, one, rel_tol=tolerance) else f"{name} is {ours:.4g} instead of {one:.4g}"
    else:
        return "" if ours == one else f"{name} is {ours} instead of {one}"
    return next((text for key, a, b in pairs if (text := differs(a, b, tolerance, f"{name}/{key}"))), "")


class Ways:
    """Runs cases in the three ways; what one process gives is kept."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.ones: dict[tuple[str, Setup], Outcome] = {}

    def one(self, case: Case, setup: Setup) -> Outcome:
        """What one process gives, or its error."""
        key = (case.name, reference_of(setup))
        if key not in self.ones:
            [self.ones[key]] = run(case, key[1], self.bench.base, self._folder(), patched=False)
        return self.ones[key]

    def verdict(self, case: Case, setup: Setup, *, patched: bool) -> str:
        """How ranks differ from one process, or ""."""
        one = self.one(case, setup)
        if case.alike and patched:
            one = run(case, setup, self.bench.base, self._folder(), patched=False)[0]
        assert not one.error, one.extra.get("traceback", one.error)
        return fault(run(case, setup, self.bench.base, self._folder(), patched=patched), one, setup)

    def hold(self, case: Case, setup: Setup) -> None:
        """The patched run ends as one process does, and with the newest releases stock as the case says."""
        newest = versions.at_least("transformers", "5.24.0")
        one = self.one(case, setup)
        if one.error and not newest:
            pytest.skip(f"one process does not do this either: {one.error}")
        said = self.verdict(case, setup, patched=True)
        assert said == "", said
        expected = case.stock.get(setup.name, "")
        if newest and expected and expected not in (EMPTY, HUNG):
            assert expected in self.verdict(case, setup, patched=False)

    def _folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.bench.folder)) / "run"


def imported(*packages: str) -> bool:
    """Import packages before ranks are forked, so that each need not; whether all are there."""
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        for package in packages:
            importlib.import_module(package)
        return True
    return False


def cells(cases: list[Case]) -> list[Any]:
    """Parameters of the test that a report's file has; set-ups that only --long runs are marked so."""
    return [
        pytest.param(case, setup, id=f"{case.name}-{setup.name}", marks=_marks(case, setup, place))
        for place, case in enumerate(cases)
        for setup in case.setups
    ]


def _chosen(place: int, case: Case) -> Setup:
    """The first set-up in which stock fails in a way of its own, or one version of FSDP by turns."""
    own = [item for item in case.setups if case.stock.get(item.name, EMPTY) not in (EMPTY, HUNG)]
    return own[0] if own else case.setups[place % len(case.setups)]


def _marks(case: Case, setup: Setup, place: int) -> list[pytest.MarkDecorator]:
    lacks = [package for package in case.missing if importlib.util.find_spec(package) is None]
    reasons = [f"no {package} here" for package in lacks]
    if case.needs and not versions.matches(case.needs, versions.installed(versions.package_of(case.needs))):
        reasons.append(f"only with {case.needs}")
    if setup.fsdp and setup.fsdp not in FLAVOURS:
        reasons.append("no FSDP2 with these releases and devices")
    if reasons:
        return [pytest.mark.skip(reason=reasons[0])]
    usual = case.always and (case.both or setup is _chosen(place, case))
    return [] if usual else [pytest.mark.long]


def collected() -> dict[str, list[Case]]:
    """Cases by the name of their file."""
    sys.path[:0] = [str(REPORTS)]
    names = [path.stem for path in sorted(REPORTS.glob("test_*.py")) if "\nCASES = [" in path.read_text()]
    return {name: importlib.import_module(name).CASES for name in names}


Row = dict[str, Any]


def row_of(file: str, case: Case) -> Row:
    """What the record says of a case beside its verdicts."""
    return {
        "case": case.name,
        "link": case.link,
        "does": case.does,
        "test": f"tests/reports/{file}.py",
        "alike": case.alike,
    }


def record(only: str, missing: bool) -> int:
    """Run cases and write their verdicts; the number of those that are wrong with the patches."""
    known: dict[str, Row] = (
        {row["case"]: row["verdicts"] for row in json.loads(DATA.read_text())} if DATA.exists() else {}
    )
    cases = [(file, case) for file, listed in collected().items() for case in listed]
    forks.TIMEOUT = 12.0
    with tempfile.TemporaryDirectory() as folder:
        ways = Ways(Bench(Path(folder)))
        for file, case in cases:
            verdicts = known.setdefault(case.name, {})
            for setup in case.setups:
                if only not in f"{file} {case.name}" or (missing and setup.name in verdicts):
                    continue
                if ways.one(case, setup).error:
                    sys.stdout.write(f"{case.name}: no reference: {ways.one(case, setup).extra['traceback']}\n")
                    break
                verdicts[setup.name] = [_short(ways.verdict(case, setup, patched=side)) for side in (False, True)]
                sys.stdout.write(f"{case.name} | {setup.name} | {' | '.join(verdicts[setup.name])}\n")
                sys.stdout.flush()
                rows = [{**row_of(file, case), "verdicts": known.get(case.name, {})} for file, case in cases]
                DATA.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    return sum(bool(pair[1]) for verdicts in known.values() for pair in verdicts.values())


def _short(text: str) -> str:
    """A verdict without what differs from run to run."""
    text = re.sub(r"/tmp/\S+", "...", text)
    return text if len(text) <= 110 else f"{text[:107]}..."


def markdown(rows: list[Row]) -> str:
    """The page of all cases."""
    ours = [row for row in rows if not row["alike"]]
    right = [sum(not pair[side] for row in ours for pair in row["verdicts"].values()) for side in (0, 1)]
    cells = sum(len(row["verdicts"]) for row in ours)
    lines = [
        "# Cases of public reports",
        "",
        "Each case does what a report's user does, on a tiny random model and two CPU ranks.",
        "One process with the same global batch says what is right: losses, norms and files.",
        f"Of {cells} cells stock has {right[0]} right, and the patches {right[1]}.",
        '"As stock" are scripts without a Trainer, for which no plan is made.',
        "`python tests/programs/cases.py --record` measures this again, and `--markdown` prints this page.",
        "",
        "| case | what the user does | stock | patched |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| [{row['case']}]({row['link']}) | {row['does']} | {_side(row, 0)} | {_side(row, 1)} |" for row in rows]
    lines += [
        "",
        "## Tried by hand",
        "",
        *(f"- [{row['case']}]({row['link']}): {row['verdict']}" for row in json.loads(BY_HAND.read_text())),
    ]
    return "\n".join(lines) + "\n"


def _side(row: Row, side: int) -> str:
    if side and row["alike"]:
        return "as stock"
    texts = {name: pair[side].replace("|", "/") or "right" for name, pair in row["verdicts"].items()}
    if set(texts.values()) == {"right"}:
        return "right"
    texts = {
        name: re.sub(r" keys missing, 0 foreign, such as .*", " keys missing", text) for name, text in texts.items()
    }
    return "<br>".join(f"{name}: {text}" for name, text in texts.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="run cases and write tests/data/cases.json")
    parser.add_argument("--missing", action="store_true", help="only those that are not in it")
    parser.add_argument("--only", default="", help="keep cases whose `file name` contains this")
    parser.add_argument("--markdown", action="store_true", help="print docs/cases.md")
    given = parser.parse_args(["--record", "--missing"] if "--file" in sys.argv else None)
    if given.markdown:
        sys.stdout.write(markdown(json.loads(DATA.read_text())))
        return 0
    return int(record(given.only, given.missing) > 0)


if __name__ == "__main__":
    sys.exit(main())
