"""A warning shows the user's own line, however deep below it was given."""

from __future__ import annotations

import linecache
import types
import warnings
from collections.abc import Callable

import pytest

from trainer_fsdp_patch import errors
from trainer_fsdp_patch.errors import TrainerFsdpPatchWarning

UPSTREAM = ("wrapt.wrappers", "peft.peft_model", "accelerate.accelerator", "torch.nn", "transformers.trainer")


def of_package(name: str, source: str, **names: object) -> Callable[[], None]:
    """The function `call` of a module that says it is of another package."""
    module = types.ModuleType(name)
    vars(module).update(names)
    exec(compile(source, f"/site-packages/{name.replace('.', '/')}.py", "exec"), vars(module))
    return module.call


def shown(call: Callable[[], None]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(item.category is TrainerFsdpPatchWarning for item in caught)
    return [linecache.getline(item.filename, item.lineno).strip() for item in caught]


@pytest.mark.parametrize("depth", range(len(UPSTREAM) + 1))
def test_frames_of_ours_and_of_upstream_are_passed(depth: int) -> None:
    below = of_package("trainer_fsdp_patch.saving.x", "def call(): warn('a', 'b', 'c', 'd')", warn=errors.warn)
    for name in UPSTREAM[:depth]:
        below = of_package(name, "def call(): below()", below=below)

    def program() -> None:
        below()  # the user's line

    assert shown(program) == ["below()  # the user's line"]


def test_context_managers_are_passed() -> None:
    source = (
        "import contextlib\n"
        "@contextlib.contextmanager\n"
        "def around():\n"
        "    warn('a', 'b', 'c', 'd')\n"
        "    yield\n"
        "def call():\n"
        "    with around(): pass\n"
    )
    below = of_package("trainer_fsdp_patch.preparing.x", source, warn=errors.warn)

    def program() -> None:
        below()  # the user's line

    assert shown(program) == ["below()  # the user's line"]


def test_a_package_whose_name_begins_alike_is_the_users() -> None:
    below = of_package("transformers_of_mine", "def call(): warn('a', 'b', 'c', 'd')", warn=errors.warn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        below()
    assert caught[0].filename == "/site-packages/transformers_of_mine.py"


def test_a_line_is_warned_of_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            errors.warn("a", "b", "c", "d")
    assert len(caught) == 1


def test_a_filter_makes_it_an_error() -> None:
    with pytest.raises(TrainerFsdpPatchWarning, match=r"a: b\. c\. d\."):
        errors.warn("a", "b", "c", "d")
