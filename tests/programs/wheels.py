"""Looks every seam up in the wheels of every release, and writes what it finds to tests/data/seams.json.

`python tests/programs/wheels.py FOLDER` downloads the wheels that FOLDER lacks (about 1.3 GB for all) and reads them
without importing or installing anything. `tests/test_seams.py` holds the patches' ranges against the result.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.version import Version

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.patching import seams

DATA = Path(__file__).parent.parent / "data" / "seams.json"


def releases(package: str) -> list[str]:
    """Final releases from the one before the oldest supported on, oldest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    [line] = [line for line in printed.splitlines() if line.startswith("Available versions: ")]
    found = sorted(Version(part) for part in line.removeprefix("Available versions: ").split(", "))
    final = [version for version in found if not version.is_prerelease]
    first = final.index(Version(versions.OLDEST_SUPPORTED[package]))
    return [str(version) for version in final[first - 1 :]]


def wheel(package: str, release: str, folder: Path) -> Path:
    """The wheel of a release, downloaded where the folder lacks it."""
    pattern = f"{package}-{release}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "-d", str(folder), f"{package}=={release}"], check=True)
    return next(folder.glob(pattern))


class Source:
    """Modules of one wheel as syntax trees."""

    def __init__(self, path: Path) -> None:
        self.archive = zipfile.ZipFile(path)
        self.names = set(self.archive.namelist())
        self.origins: dict[int, str] = {}
        self.tree = functools.cache(self._tree)

    def _tree(self, module: str) -> ast.Module | None:
        base = module.replace(".", "/")
        for name in (f"{base}.py", f"{base}/__init__.py"):
            if name in self.names:
                text = self.archive.read(name).decode()
                tree = ast.parse(text)
                self.origins.update({id(node): text for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)})
                return tree
        return None

    def text(self, function: ast.FunctionDef) -> str:
        """Source of a function of this wheel, from its `def` on."""
        lines = self.origins[id(function)].splitlines()
        return "\n".join(lines[function.lineno - 1 : function.end_lineno])

    def look(self, target: str, path: str) -> dict[str, object] | None:
        """What `seams.look` gives where the release is installed."""
        function = self.find(target, path)
        if function is None:
            return self.made(target, path) or self.imported(target, path)
        return {"parameters": parameters(function), "digest": seams.digest(self.text(function))}

    def made(self, module: str, path: str) -> dict[str, object] | None:
        """The `__init__` of a class whose decorator `dataclass` makes it."""
        name, _, method = path.partition(".")
        tree = self.tree(module)
        for node in ast.walk(tree) if tree is not None and method == "__init__" else ():
            if isinstance(node, ast.ClassDef) and node.name == name and _is_dataclass(node):
                fields = ["self", *(ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign))]
                return {"parameters": fields, "digest": seams.digest(seams.generated(fields))}
        return None

    def imported(self, module: str, name: str) -> dict[str, object] | None:
        """Name of what a module imports from another package."""
        tree = self.tree(module)
        for node in ast.walk(tree) if tree is not None else ():
            if isinstance(node, ast.ImportFrom) and not node.level:
                for item in node.names:
                    if (item.asname or item.name) == name:
                        return {"imported": f"{node.module}.{item.name}"}
        return None

    def find(self, module: str, path: str) -> ast.FunctionDef | None:
        """Definition of a dotted path, through the imports of other modules of the same wheel."""
        first, _, rest = path.partition(".")
        tree = self.tree(module)
        if tree is None:
            return None
        if rest and self.tree(f"{module}.{first}") is not None:
            return self.find(f"{module}.{first}", rest)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == first and not _is_overload(node):
                return node if isinstance(node, ast.FunctionDef) else self._method(node, rest)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and first in {item.asname or item.name for item in node.names}:
                origin = self._origin(module, node)
                original = next(item.name for item in node.names if (item.asname or item.name) == first)
                found = self.find(origin, f"{original}.{rest}".rstrip(".")) if origin else None
                if found is not None:
                    return found
        return None

    def _method(self, node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
        methods = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == name]
        return next((item for item in methods if not _is_overload(item)), None)

    def _origin(self, module: str, node: ast.ImportFrom) -> str | None:
        package = module.split(".")
        if f"{module.replace('.', '/')}/__init__.py" not in self.names:
            package = package[:-1]
        if not node.level:
            return node.module if node.module and node.module.split(".")[0] == package[0] else None
        return ".".join([*package[: len(package) + 1 - node.level], *([node.module] if node.module else [])])


def _is_overload(node: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether a definition is for type checkers alone, and another one runs."""
    return any(ast.unparse(item).endswith("overload") for item in node.decorator_list)


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any(ast.unparse(item).partition("(")[0].endswith("dataclass") for item in node.decorator_list)


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names of a function's parameters as `inspect.signature` orders them."""
    given = function.args
    stars = [[item.arg] if item else [] for item in (given.vararg, given.kwarg)]
    plain = [item.arg for item in (*given.posonlyargs, *given.args)]
    return [*plain, *stars[0], *(item.arg for item in given.kwonlyargs), *stars[1]]


def read(folder: Path) -> dict[str, object]:
    """Every release, and for every seam its parameters and body from each release on that changed them."""
    result: dict[str, object] = {"releases": {}, "seams": {}}
    listed = list(seams.known())
    for package in versions.OLDEST_SUPPORTED:
        every = releases(package)
        result["releases"][package] = every
        changes: dict[str, dict[str, dict[str, object] | None]] = {}
        for release in every:
            source = Source(wheel(package, release, folder))
            for target, path, _ in listed:
                if target.split(".")[0] == package:
                    turns = changes.setdefault(f"{target}.{path}", {})
                    found = source.look(target, path)
                    if not turns or list(turns.values())[-1] != found:
                        turns[release] = found
        result["seams"].update(changes)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    DATA.write_text(json.dumps(read(given.folder), indent=1) + "\n")
