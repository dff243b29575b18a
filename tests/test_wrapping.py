"""Wrapping is all or nothing, and undo restores raw attributes."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import wrapt

from trainer_fsdp_patch.errors import PatchError
from trainer_fsdp_patch.patching import wrapping
from trainer_fsdp_patch.patching.wrapping import Seam


def module() -> types.ModuleType:
    code = """
class Base:
    def method(self, value): return value
    @staticmethod
    def static(value): return value
    @classmethod
    def of(cls, value): return cls, value
class Child(Base): pass
def function(value): return value
"""
    made = types.ModuleType("upstream_target")
    exec(code, made.__dict__)
    return made


def twice(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    result = wrapped(*args, **kwargs)
    return (*result[:-1], result[-1] * 2) if isinstance(result, tuple) else result * 2


PATHS = [
    ("Base.method", ("self", "value")),
    ("Base.static", ("value",)),
    ("Base.of", ("cls", "value")),
    ("Child.method", ("self", "value")),
    ("function", ("value",)),
]


@pytest.mark.parametrize(("path", "parameters"), PATHS)
def test_every_kind_of_function_is_wrapped_and_restored(path: str, parameters: tuple[str, ...]) -> None:
    target = module()
    owner = getattr(target, path.split(".")[0])
    before = dict(vars(owner)) if isinstance(owner, type) else owner
    seam = Seam(path, parameters, twice)
    wrapping.apply(target, [seam])
    wrapping.apply(target, [seam])
    name = path.split(".")[-1]
    called = getattr(owner() if isinstance(owner, type) else target, name)(3)
    assert (called[1] if isinstance(called, tuple) else called) == 6
    wrapping.undo([seam])
    wrapping.undo([seam])
    after = dict(vars(owner)) if isinstance(owner, type) else target.function
    assert after == before


def test_nothing_is_written_where_one_seam_is_missing() -> None:
    target = module()
    before = target.function
    with pytest.raises(PatchError, match="upstream_target has no gone"):
        wrapping.apply(target, [Seam("function", ("value",), twice), Seam("gone", (), twice)])
    assert target.function is before


def test_other_parameters_are_refused() -> None:
    with pytest.raises(PatchError, match=r"takes \(value\), the patch knows \(model\)"):
        wrapping.apply(module(), [Seam("function", ("model",), twice)])


def test_what_is_no_function_is_refused() -> None:
    target = module()
    target.function = 3  # type: ignore[attr-defined]
    with pytest.raises(PatchError, match="is not a function"):
        wrapping.apply(target, [Seam("function", ("value",), twice)])


def test_a_write_that_fails_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    target = module()
    before = target.function
    write = wrapping._write

    def failing(module: types.ModuleType, seam: Seam) -> None:
        if seam.path == "Base.method":
            raise OSError("no room")
        write(module, seam)

    monkeypatch.setattr(wrapping, "_write", failing)
    with pytest.raises(OSError, match="no room"):
        wrapping.apply(target, [Seam("function", ("value",), twice), Seam("Base.method", ("self", "value"), twice)])
    assert target.function is before


def test_a_third_partys_wrapper_on_top_survives() -> None:
    target: Any = module()
    seam = Seam("function", ("value",), twice)
    wrapping.apply(target, [seam])
    theirs = wrapt.FunctionWrapper(target.function, lambda wrapped, instance, args, kwargs: wrapped(*args) + 1)
    target.function = theirs
    assert target.function(3) == 7
    wrapping.undo([seam])
    assert target.function is theirs
    assert target.function(3) == 4
    wrapping.apply(target, [seam])
    assert target.function is theirs
    assert target.function(3) == 7
    assert wrapping.depth(target.function) == 1


def test_a_foreign_function_on_the_seam_is_named() -> None:
    target: Any = module()
    target.function.__module__ = "axolotl.monkeypatch"
    seam = Seam("function", ("value",), twice)
    wrapping.apply(target, [seam])
    assert seam.foreign == "axolotl.monkeypatch"
    assert "axolotl" not in sys.modules


def foreign(name: str, code: str, **names: Any) -> Any:
    """A function of somebody else's module."""
    made = types.ModuleType(name)
    vars(made).update(names)
    exec(code, made.__dict__)
    return made.__dict__["replacement"]


WRAPS = """
import functools
@functools.wraps(original)
def replacement(value): return original(value) + 1
"""
WRAPT = """
import wrapt
replacement = wrapt.FunctionWrapper(original, lambda wrapped, instance, args, kwargs: wrapped(*args) + 1)
"""


@pytest.mark.parametrize("code", [WRAPS, WRAPT], ids=["functools", "wrapt"])
def test_a_foreign_wrapper_is_named_below_and_above_ours(code: str) -> None:
    """Both ways of wrapping show the name of the module that they wrap."""
    target: Any = module()
    target.function = foreign("swift.patcher", code, original=target.function)
    seam = Seam("function", ("value",), twice)
    wrapping.apply(target, [seam])
    assert seam.foreign == "swift.patcher"
    assert target.function(3) == 8
    other: Any = module()
    seam = Seam("function", ("value",), twice)
    wrapping.apply(other, [seam])
    assert seam.foreign == ""
    other.function = foreign("llamafactory.model", code, original=other.function)
    assert wrapping.replaced(other, seam) == ""
    assert seam.foreign == "llamafactory.model"
    assert other.function(3) == 7


def test_who_assigned_over_ours_is_named() -> None:
    target: Any = module()
    seam = Seam("function", ("value",), twice)
    wrapping.apply(target, [seam])
    target.function = foreign("unsloth.models", "def replacement(value): return 0")
    assert wrapping.replaced(target, seam) == "unsloth.models"
    del target.function
    assert wrapping.replaced(target, seam) == "somebody who removed it"
