"""The house: a room imports from rooms below it only, and no room, module or function is too large to read."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import trainer_fsdp_patch

PACKAGE = Path(trainer_fsdp_patch.__file__).parent
ROOMS = (
    "reporting",
    "commands",
    "checking",
    "testing",
    "preparing",
    "announcing",
    "estimating",
    "adapting",
    "training",
    "resuming",
    "saving",
    "loading",
    "planning",
    "packing",
    "measuring",
    "inspecting",
    "files",
    "ranks",
    "ground",
)
"""From the top floor to the ground; `patching` stands alone on the ground, and knows nothing of FSDP."""
DOOR = {"__init__", "__main__", "cli", "gates"}
"""Modules that open the rooms to users and to patches; no room imports them."""

TAGS = {
    "adapting/residents.py": ["torch 2.8"],
    "casts.py": ["torch 2.4"],
    "devices.py": ["torch 2.6", "torch 2.6", "torch 2.5"],
    "estimating/activations.py": ["transformers 5.23", "transformers 5.23"],
    "estimating/building.py": ["transformers 5.0"],
    "estimating/quantizing.py": ["transformers 4.46"],
    "estimating/settings.py": ["transformers 4.51", "accelerate 1.6", "transformers 5.10"],
    "files/reading.py": ["torch 2.3"],
    "inspecting/inventory.py": ["torch 2.5"],
    "inspecting/tuning.py": ["peft 0.15"],
    "inspecting/sharing.py": ["accelerate 1.6"],
    "packing/planned.py": ["torch 2.8"],
    "planning/budget.py": ["accelerate 1.15", "torch 2.13"],
    "planning/expecting.py": ["accelerate 1.15"],
    "preparing/fsdp2.py": ["accelerate 1.14", "torch 2.7"],
    "preparing/fsdp_plugin.py": ["accelerate 1.0", "accelerate 1.0"],
    "preparing/layers.py": ["peft 0.20"],
    "reporting/fitting.py": ["transformers 5.10", "accelerate 1.6"],
    "resuming/optimizer_state.py": ["accelerate 1.7"],
    "resuming/resume.py": ["accelerate 1.7", "accelerate 1.9"],
    "saving/gathering.py": ["torch 2.7"],
    "saving/peft_state_dict.py": ["transformers 5.21"],
    "training/batch_size.py": ["torch 2.15", "torch 2.13"],
}
"""Every difference between releases in the engine, by module: up to which release it matters."""

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
PATCHES = sorted((PACKAGE.parent / "patches").glob("*.py"))


def room_of(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else "door" if path.stem in DOOR else "ground"


def imported(text: str) -> set[Path]:
    """Modules of this package that a text imports, at its top or inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trainer_fsdp_patch":
            folder = Path(*str(node.module).split(".")[1:])
            for alias in node.names:
                inside = folder / f"{alias.name}.py"
                found.add(inside if inside in MODULES else folder.with_suffix(".py"))
    return found


def wrong_arrows(room: str, text: str) -> list[str]:
    """Imports that a module of a room must not have."""
    below = ("patching", "ground") if room == "patching" else ROOMS[ROOMS.index(room) :]
    # `check` and `status` show what patches do: they are no part of the engine.
    below += ("patching",) if room in ("commands", "checking", "testing") else ()
    return [str(path) for path in sorted(imported(text)) if room_of(path) not in below]


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path) != "door"], ids=str)
def test_a_room_imports_from_rooms_below_it(path: Path) -> None:
    assert wrong_arrows(room_of(path), (PACKAGE / path).read_text()) == []


def test_an_arrow_that_is_turned_round_is_seen() -> None:
    up = "from trainer_fsdp_patch.saving import adapter_state"
    assert wrong_arrows("planning", up) == ["saving/adapter_state.py"]
    assert wrong_arrows("patching", "def late():\n    from trainer_fsdp_patch import cli") == ["cli.py"]
    assert wrong_arrows("resuming", up) == []


def test_every_folder_is_a_room() -> None:
    assert {room_of(path) for path in MODULES} == {*ROOMS, "patching", "door"}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_modules_and_functions_are_short(path: Path) -> None:
    text = (PACKAGE / path).read_text()
    assert len(text.splitlines()) <= 350
    functions = (
        node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    assert [node.name for node in functions if body_length(node) > 50] == []


def body_length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return 0 if not body else int(body[-1].end_lineno or 0) - body[0].lineno + 1


def test_version_differences_are_tagged() -> None:
    """`git grep "# until"` finds what can go with the oldest releases; the engine asks for no other version."""
    tags = {}
    for path in MODULES:
        lines = (PACKAGE / path).read_text().splitlines()
        for match in filter(None, (re.search(r"# until (.*)", line) for line in lines)):
            parsed = re.fullmatch(r"(accelerate|peft|torch|transformers) (\d+\.\d+)(: .*)?", match[1])
            assert parsed, f"{path}: {match[0]}"
            tags.setdefault(str(path), []).append(f"{parsed[1]} {parsed[2]}")
        asks = [number for number, line in enumerate(lines) if "at_least(" in line and "def at_least" not in line]
        engine = room_of(path) not in ("checking", "testing", "door", "patching")
        untagged = [number + 1 for number in asks if not any("# until" in line for line in lines[number - 3 : number])]
        assert untagged == [] or not engine, path
    assert tags == TAGS


@pytest.mark.parametrize("room", [*ROOMS, "patching"])
def test_rooms_are_small(room: str) -> None:
    sizes = [len((PACKAGE / path).read_text().splitlines()) for path in MODULES if room_of(path) == room]
    assert 0 < sum(sizes) <= 1200


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: str(path.stem))
def test_a_patch_holds_no_logic(path: Path) -> None:
    """It declares, wraps and hands over: no loop, no class, and no function of more than ten lines."""
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.For, ast.While, ast.ClassDef, ast.Try))]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if body_length(node) > 10] == []
