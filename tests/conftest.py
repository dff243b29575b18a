"""Shared by all tests: patches are undone after each, distributed cases run on forked ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import trainer_fsdp_patch
from trainer_fsdp_patch import versions
from trainer_fsdp_patch.patching import registry

if TYPE_CHECKING:
    from cases import Ways
    from cells import Bench

os.environ["OMP_NUM_THREADS"] = "1"
with warnings.catch_warnings():
    # Quantizers warn of each other's torch as they are imported, once.
    warnings.simplefilter("ignore")
    import cells  # noqa: F401
ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run what repeats other tests at length too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A patch's own tests run where its range holds; elsewhere they say which release is installed."""
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="--long runs it"))
        name = item.path.stem.removeprefix("test_")
        patch = registry.discover().get(name) if item.path.parent.name == "patches" else None
        if patch is not None and not patch.concerns():
            package = versions.package_of(patch.versions)
            reason = f"{package} {versions.installed(package)} is outside {patch.versions}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    trainer_fsdp_patch.unpatch()


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The matrix's bench: forks ranks, and trains each one-process reference once for the session."""
    from cells import Bench

    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def ways(bench: Bench) -> Ways:
    """Runs the cases of public reports; what one process gives is kept for the session."""
    from cases import Ways

    return Ways(bench)


@pytest.fixture(scope="session")
def python() -> Callable[..., str]:
    """Runs a program in a fresh interpreter, from the repository root, and returns what it prints."""

    def run(code: str, **environment: str) -> str:
        finished = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout.strip()

    return run
