"""The order in which the wrappers act in a run, as tables of docs/how-it-works.md.

    python tests/programs/timeline.py            # the tables
    python tests/programs/timeline.py --record   # written into the page, between its marks

Two ranks train LoRA with FSDP1 and with FSDP2, save, and resume. Each wrapper that acts notes its name. A table has
each wrapper once for a phase, where it acts first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    here = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(here / part) for part in ("", "helpers", "matrix", "programs")]

from cells import METHODS, Bench, Setup, trial

from trainer_fsdp_patch.patching import registry
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome

PAGE = Path(__file__).parent.parent.parent / "docs" / "how-it-works.md"
PHASES = ("prepare", "step", "save", "resume")


def noted(setup: Setup, base: str, folder: str, rank: int) -> Outcome:
    """Wrappers that act in each phase of a run, of a save and of a resumed run, in order."""
    from transformers import Trainer, TrainerCallback

    given = trial.enter(setup, folder, 2, patched=True)
    phases: dict[str, list[str]] = {phase: [] for phase in PHASES}
    phase = ["prepare"]

    def noting(name: str, function: Any) -> Any:
        def wrapper(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            if name not in phases[phase[0]]:
                phases[phase[0]].append(name)
            return function(wrapped, instance, args, kwargs)

        return wrapper

    for patch in registry.discover().values():
        for seam in patch.seams:
            seam.function = noting(f"{patch.name}:{seam.path}", seam.function)

    class Phases(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            phase[0] = "step"

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            phase[0] = "save"

    def train(steps: int, **resumed: Any) -> None:
        given.save_strategy, given.save_steps, given.max_steps = "steps", 2, steps
        model = METHODS["lora"](trial.load_base(base, setup))
        Trainer(model=model, args=given, train_dataset=trial.dataset(24), callbacks=[Phases()]).train(**resumed)

    train(2)
    phase[0] = "resume"
    train(3, resume_from_checkpoint=True)
    return Outcome(extra=phases)


def merged(orders: list[list[str]]) -> list[str]:
    """One order of all names, in which each follows what it follows in its own list."""
    together = list(orders[0])
    for order in orders[1:]:
        place = 0
        for name in order:
            if name in together:
                place = max(place, together.index(name) + 1)
            else:
                together.insert(place, name)
                place += 1
    return together


def timelines(base: str, folder: Path) -> dict[int, dict[str, list[str]]]:
    """What `noted` gives for each version of FSDP."""
    found = {}
    for version in (1, 2):
        place = folder / str(version)
        place.mkdir(parents=True)
        first = forks.launch(noted, Setup("timeline", fsdp=version), base, str(place), ranks=2)[0]
        if first.error:
            raise RuntimeError(first.error)
        found[version] = first.extra
    return found


def rows(lines: dict[int, dict[str, list[str]]], phase: str) -> Iterator[str]:
    """A table of one phase; of a resumed run, what no fresh run does before its first step."""
    effects = {patch.name: patch.effect for patch in registry.discover().values()}
    yield "| function | FSDP | its patch |"
    yield "| --- | --- | --- |"
    for name in merged([lines[version][phase] for version in lines]):
        if phase == "resume" and any(name in lines[version]["prepare"] for version in lines):
            continue
        patch, _, path = name.partition(":")
        versions = ", ".join(str(version) for version in lines if name in lines[version][phase])
        yield f"| [`{path}`](../patches/{patch}.py) | {versions} | {effects[patch]} |"


def page(text: str, lines: dict[int, dict[str, list[str]]]) -> str:
    """The text of the page with the tables between its marks."""
    for phase in PHASES:
        before, start, rest = text.partition(f"<!-- timeline: {phase} -->\n")
        _, end, after = rest.partition("\n<!-- end -->")
        if not (start and end):
            raise ValueError(f"{PAGE.name} has no marks for the table of {phase}")
        text = f"{before}{start}\n" + "\n".join(rows(lines, phase)) + f"\n{end}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the tables into docs/how-it-works.md")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = timelines(Bench(Path(folder)).base, Path(folder) / "runs")
    text = page(PAGE.read_text(), lines)
    if given.record:
        PAGE.write_text(text)
    else:
        print("\n\n".join("\n".join(rows(lines, phase)) for phase in PHASES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
