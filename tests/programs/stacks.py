"""What one stack of releases does: five adapters on both versions of FSDP, trained, saved and resumed.

`python tests/programs/stacks.py --json FILE` runs it on what is installed, stock beside patched, each against one
process and, in what it takes of a rank, against its plan and stock; `python tests/programs/stacks.py --table FILE...`
prints what several stacks gave. `nox` does both for every stack; what it last gave is tests/data/stacks.json, and
tests/data/torches.json is of the other torch releases.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# As a program it finds what tests find by pytest's own path.
sys.path[:0] = [str(Path(__file__).parent.parent / name) for name in ("matrix", "helpers")]

from trainer_fsdp_patch.testing import forks

DATA = Path(__file__).parent.parent / "data"
PACKAGES = ("transformers", "accelerate", "peft", "torch", "bitsandbytes")


def scenarios() -> Iterator[tuple[str, Callable[[Any], Any], Any]]:
    """Adapter, how it is made, and set-up, of those that the installed releases have at all."""
    import peft
    from cells import METHODS, Setup, has, with_a_head

    from trainer_fsdp_patch.testing import releases

    def ia3(model: Any) -> Any:
        targets = ["k_proj", "v_proj", "down_proj"]
        return peft.get_peft_model(model, peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"]))

    adapters = {"VeRA": METHODS["vera"], "LoRA": METHODS["lora"], "RandLora": METHODS["randlora"]}
    adapters |= {"IA3": ia3, "modules_to_save": with_a_head}
    for fsdp in (1, 2) if releases.has_fsdp2() else (1,):
        for setup in (Setup(f"FSDP{fsdp}", fsdp=fsdp), Setup(f"FSDP{fsdp} amp", fsdp=fsdp, amp="bf16")):
            for adapter, configure in adapters.items():
                if has(adapter.lower()):
                    yield adapter, configure, setup


def here(only: str, *, stock: bool) -> dict[str, Any]:
    """Every scenario on the installed releases."""
    from cells import SIDES, Bench, beside, numbers

    from trainer_fsdp_patch import versions

    forks.TIMEOUT = 20.0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for adapter, configure, setup in scenarios():
            name = f"{adapter} {setup.name}"
            if only not in name:
                continue
            row: dict[str, Any] = {"scenario": name, "patched": bench.resumed(configure, setup, adapter, patched=True)}
            if stock:
                row["stock"] = bench.resumed(configure, setup, adapter, patched=False)
            took = {side: bench.took.get((adapter, setup.name, side == "patched")) for side in SIDES}
            row["patched"] = row["patched"] or beside(took["patched"], took["stock"])
            row["took"] = {side: numbers(taken) for side, taken in took.items() if taken}
            rows.append(row)
            sys.stderr.write(f"{row}\n")
    return {"installed": {name: str(versions.installed(name)) for name in PACKAGES}, "rows": rows}


def table(results: list[dict[str, Any]]) -> int:
    """Print scenario by stack, stock -> patched; 1 where a patched cell is wrong."""
    from rich.console import Console
    from rich.table import Table

    output = Table(title="stock -> patched: + is right, - is wrong, blank is not in that stack", title_justify="left")
    output.add_column("transformers\naccelerate\npeft\ntorch")
    for result in results:
        output.add_column("\n".join(result["installed"][name].split("+")[0] for name in PACKAGES[:4]), no_wrap=True)
    rows = [{row["scenario"]: row for row in result["rows"]} for result in results]
    wrong = []
    for name in max(rows, key=len):
        marks = []
        for result, row in zip(results, rows, strict=True):
            sides = [row[name].get(side) for side in ("stock", "patched")] if name in row else []
            marks.append(" -> ".join("?" if side is None else "-" if side else "+" for side in sides))
            if sides and sides[1]:
                wrong.append(f"{result['installed']['transformers']} {name}: {sides[1]}")
        output.add_row(name, *marks)
    Console(width=20 + 9 * max(len(results), 8) + 6).print(output)
    sys.stdout.write("".join(f"WRONG {line}\n" for line in wrong))
    return int(bool(wrong))


def markdown(results: list[dict[str, Any]]) -> str:
    """docs/measured.md's table: how many scenarios of each stack are right."""
    head = " | ".join(PACKAGES[:4])
    rows = [f"| {head} | scenarios | stock right | patched right |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for result in results:
        counts = [len(result["rows"])] + [
            sum(row[side] == "" for row in result["rows"]) for side in ("stock", "patched")
        ]
        names = [result["installed"][name].split("+")[0] for name in PACKAGES[:4]]
        rows.append(f"| {' | '.join([*names, *map(str, counts)])} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="keep scenarios whose name contains this")
    parser.add_argument("--no-stock", action="store_true", help="leave the unpatched side out")
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--table", nargs="+", help="print results of earlier runs instead")
    parser.add_argument(
        "--record", type=Path, help="with --table, write them to one file, and print the table of docs/measured.md"
    )
    given = parser.parse_args()
    if given.table:
        results = [json.loads(Path(path).read_text()) for path in given.table]
        if given.record:
            given.record.write_text(json.dumps(results, indent=1) + "\n")
            sys.stdout.write(markdown(results))
        return table(results)
    result = here(given.only, stock=not given.no_stock)
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=1) + "\n")
    return table([result])


if __name__ == "__main__":
    sys.exit(main())
