"""`python -m trainer_fsdp_patch seams`: what moved upstream since the newest tested releases."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.patching import registry, wrapping

Entry = dict[str, str | list[str]]
"""What is recorded of one upstream function."""

RECORD = Path(__file__).with_name("seams.json")
"""What the newest tested releases have, written by `seams --record`."""

WATCHED = (
    ("accelerate.accelerator", "Accelerator.unwrap_model"),
    ("accelerate.utils.dataclasses", "FullyShardedDataParallelPlugin.set_mixed_precision"),
    ("accelerate.utils.fsdp_utils", "load_fsdp_model"),
    ("accelerate.utils.fsdp_utils", "save_fsdp_model"),
    ("accelerate.utils.fsdp_utils", "save_fsdp_optimizer"),
    ("peft.utils.save_and_load", "get_peft_model_state_dict"),
    ("peft.utils.other", "fsdp_auto_wrap_policy"),
    ("transformers.trainer", "Trainer._inner_training_loop"),
    ("transformers.trainer", "Trainer._save"),
    ("transformers.trainer", "Trainer._save_checkpoint"),
    ("transformers.trainer", "Trainer.create_accelerator_and_postprocess"),
    ("transformers.trainer", "Trainer.training_step"),
)
"""Functions that no patch wraps, but whose behaviour the engine counts on."""


@dataclass(frozen=True)
class Move:
    """One seam, now and in the newest tested release.

    Attributes:
        seam: module and dotted path.
        patches: names of the patches that wrap it, in any release; none where it is only watched.
        state: same, body (only the body changed), signature, gone, or new.
        detail: what was recorded and what is there now, where they differ.
    """

    seam: str
    patches: tuple[str, ...]
    state: str
    detail: str


def known() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Every seam once: target module, dotted path, patches."""
    seams: dict[tuple[str, str], list[str]] = {}
    for patch in registry.discover().values():
        for seam in patch.seams:
            seams.setdefault((patch.target, seam.path), []).append(patch.name)
    witnesses = (patch.witness for patch in registry.discover().values() if patch.witness is not None)
    for watched in (*WATCHED, *witnesses):
        seams.setdefault(watched, [])
    for (target, path), names in sorted(seams.items()):
        yield target, path, tuple(names)


def look(target: str, path: str) -> Entry | None:
    """Parameters of an upstream function and a digest of its source, or None where it is not there.

    Of what the target imports from another package there is only its name: that package has releases of its own.

    Args:
        target: dotted name of the module; it is imported.
        path: dotted path inside it.
    """
    try:
        function = wrapping.resolve(importlib.import_module(target), path)[2]
    except (AttributeError, ImportError):
        return None
    function = inspect.unwrap(getattr(function, "__func__", function))
    if function.__module__.split(".")[0] != target.split(".")[0]:
        return {"imported": f"{function.__module__}.{function.__qualname__}"}
    parameters = list(inspect.signature(function).parameters)
    code = getattr(function, "__code__", None)
    try:
        # Python 3.13 would take a program's `-c` for the source of a function that has no file.
        made = code is not None and code.co_filename.startswith("<")
        source = generated(parameters) if made else inspect.getsource(function)
    except OSError:
        # Neither has a release that was installed without its sources.
        source = generated(parameters)
    return {"parameters": parameters, "digest": digest(source)}


def generated(parameters: Sequence[str]) -> str:
    """What stands for the source of an `__init__` that dataclasses made: it has none, and follows from the fields.

    Args:
        parameters: names of its parameters, with `self`.
    """
    return f"def __init__({', '.join(parameters)})"


def digest(source: str) -> str:
    """Short hash of a function's source, from its `def` on, whatever its indentation."""
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    first = next(index for index, line in enumerate(lines) if line.startswith("def "))
    return hashlib.sha256("\n".join(lines[first:]).encode()).hexdigest()[:16]


def moves() -> list[Move]:
    """Compare the installed releases with the record; every seam is in the result."""
    record = json.loads(RECORD.read_text())["seams"]
    compared = []
    for target, path, names in known():
        seam = f"{target}.{path}"
        then, now = record.get(seam), look(target, path)
        state, detail = _difference(then, now)
        compared.append(Move(seam, names, state, detail))
    return compared


def _difference(then: Entry | None, now: Entry | None) -> tuple[str, str]:
    if then is None or now is None:
        return ("same" if then is now else "new" if then is None else "gone"), ""
    if "imported" in then or "imported" in now:
        return ("same", "") if then == now else ("signature", f"{then} -> {now}")
    if then["parameters"] != now["parameters"]:
        return "signature", f"({', '.join(then['parameters'])}) -> ({', '.join(now['parameters'])})"
    return ("same", "") if then["digest"] == now["digest"] else ("body", "read what changed in it")


def write_record() -> None:
    """Write what is installed as the newest tested releases."""
    seams = {f"{target}.{path}": look(target, path) for target, path, _ in known()}
    installed = {package: str(versions.installed(package)) for package in ("accelerate", "peft", "transformers")}
    content = {"installed": installed, "seams": {seam: entry for seam, entry in seams.items() if entry is not None}}
    RECORD.write_text(json.dumps(content, indent=1) + "\n")


def report() -> int:
    """Print what moved; 1 where a patch that concerns what is installed would not fit."""
    from rich.console import Console
    from rich.table import Table

    tested = json.loads(RECORD.read_text())["installed"]
    title = ", ".join(f"{name} {release} -> {versions.installed(name)}" for name, release in tested.items())
    table = Table(title=title, title_justify="left")
    for column in ("seam", "patches", "state"):
        table.add_column(column, overflow="fold")
    every = moves()
    moved = [move for move in every if move.state != "same"]
    for move in moved:
        names = ", ".join(move.patches) or "only watched"
        table.add_row(move.seam, names, f"{move.state}: {move.detail}" if move.detail else move.state)
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table if moved else title)
    console.print(f"{len(moved)} of {len(every)} seams moved")
    return int(any(map(is_broken, moved)))


def is_broken(move: Move) -> bool:
    """Whether a patch that concerns what is installed cannot be applied to what the seam has become."""
    if move.state not in ("signature", "gone"):
        return False
    concerned = [registry.find(name) for name in move.patches if registry.find(name).concerns()]
    seams = [(item, seam) for item in concerned for seam in item.seams if f"{item.target}.{seam.path}" == move.seam]
    return not all(_fits(look(item.target, seam.path), seam) for item, seam in seams)


def _fits(entry: Entry | None, seam: wrapping.Seam) -> bool:
    """Whether a wrapper takes a function; what is imported from elsewhere is looked at when the patch is applied."""
    return entry is not None and ("parameters" not in entry or seam.takes(tuple(entry["parameters"])))
