"""Wraps seams with wrapt: all of a patch or nothing, and back to identity."""

from __future__ import annotations

import copy
import functools
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, SupportsIndex

import wrapt

from trainer_fsdp_patch.errors import PatchError

Wrapped = Callable[..., Any]
"""The upstream function as wrapt hands it over: bound to its instance, to be called without it."""

Args = tuple[Any, ...]
"""Positional arguments of a wrapped call, without the instance."""

Kwargs = dict[str, Any]
"""Keyword arguments of a wrapped call, or all of its arguments by name."""

WrapperFunction = Callable[[Wrapped, Any, Args, Kwargs], object]
"""A function in wrapt's four-argument form; its second argument is the instance, or None for a plain function."""

Gate = Callable[[Any, Kwargs], bool]
"""Asked with the instance and the arguments by name whether a call is one that a patch is for."""

_ABSENT = object()


class BoundWrapper(wrapt.BoundFunctionWrapper):  # type: ignore[misc]
    """What a class or an instance answers with; it is copied and pickled as the function or method would be."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        if self._self_instance is None:
            reduced: tuple[object, ...] = self._self_parent.__reduce_ex__(protocol)
            return reduced
        return getattr, (self._self_instance, self.__name__)

    def __reduce__(self) -> tuple[object, ...]:
        return self.__reduce_ex__(2)

    def __copy__(self) -> object:
        return self if self._self_instance is None else getattr(self._self_instance, self.__name__)

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        if self._self_instance is None:
            return self
        return getattr(copy.deepcopy(self._self_instance, memo), self.__name__)


class PatchWrapper(wrapt.FunctionWrapper):  # type: ignore[misc]
    """Our wrapper, told from anybody else's by its type.

    Functions are one object for all who look them up, are copied as themselves and are pickled by name. datasets hashes
    them; Ray and multiprocessing send them. wrapt's wrappers are and do none of that.
    """

    __bound_function_wrapper__ = BoundWrapper

    def __init__(
        self,
        wrapped: object,
        wrapper: WrapperFunction,
        *,
        enabled: Callable[[], bool] | None = None,
        place: str = "",
    ) -> None:
        super().__init__(wrapped, wrapper, enabled=enabled)
        # wrapt keeps what is named `_self_...` on the wrapper, and passes all other attributes to the function.
        self._self_place, self._self_unbound = place, None

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is not None:
            return super().__get__(instance, owner)
        # wrapt makes a new object at each look-up. Kept, it is one object, as the function itself would be.
        if self._self_unbound is None:
            self._self_unbound = super().__get__(None, owner)
        return self._self_unbound

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        # A function of the standard library: where it is unpickled, this package need not be.
        return pkgutil.resolve_name, (self._self_place,)

    def __reduce__(self) -> tuple[object, ...]:
        return self.__reduce_ex__(2)

    def __copy__(self) -> object:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> object:
        return self


def argument(args: Args, kwargs: Kwargs, place: int, name: str, default: object = None) -> Any:
    """An argument of a wrapped call, however it was passed.

    Args:
        args: of the call, without the instance.
        kwargs: of the call.
        place: of the parameter among them.
        name: of the parameter.
        default: where it was left out.
    """
    return args[place] if len(args) > place else kwargs.get(name, default)


def _never() -> bool:
    return False


@dataclass
class Seam:
    """One upstream name, the parameters that it must have, and what is put around it.

    Args:
        path: dotted path inside the target module, such as `Trainer._wrap_model`.
        parameters: names of the parameters of the upstream function, in order. "..." at the end is any others, which
            the wrapper hands on unread.
        function: wrapper in wrapt's four-argument form.
        enabled: asked at each call whether the wrapper is to act.
        only: asked at each call whether it is one of ours; all others go upstream as they came. None is all calls.
    """

    path: str
    parameters: tuple[str, ...]
    function: WrapperFunction
    enabled: Callable[[], bool] = lambda: True
    only: Gate | None = None
    live: bool = False
    foreign: str = ""
    _wrapper: PatchWrapper | None = None
    _turn: int = 0
    _entry: tuple[object, str, object] | None = field(default=None, repr=False)

    def is_active(self, turn: int) -> bool:
        """Whether the wrapper that was put on at that turn is to act. A gate that is shut needs no call to be seen."""
        return self.live and turn == self._turn and not self._shut() and self.enabled()

    def call(self, wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
        """What stands in the place of the upstream function."""
        if self.only is None or self.only(instance, self.named(args, kwargs)):
            return self.function(wrapped, instance, args, kwargs)
        return wrapped(*args, **kwargs)

    def takes(self, parameters: tuple[str, ...]) -> bool:
        """Whether an upstream function with these parameters is one that the wrapper was written for."""
        if self.parameters[-1:] == ("...",):
            return parameters[: len(self.parameters) - 1] == self.parameters[:-1]
        return parameters == self.parameters

    def named(self, args: Args, kwargs: Kwargs) -> Kwargs:
        """A call's arguments by name, but for the instance; what is left to defaults is absent."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    @functools.cached_property
    def _shut(self) -> Callable[[], bool]:
        return getattr(self.only, "shut", _never)

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        return self.parameters[1:] if self.parameters[:1] == ("self",) else self.parameters


def resolve(module: ModuleType, path: str) -> tuple[object, str, Any]:
    """Parent, attribute name and raw attribute (a staticmethod stays one) of a dotted path.

    Args:
        module: imported.
        path: dotted path inside it.

    Raises:
        AttributeError: the module has no such path.
    """
    parent, attribute, original = wrapt.resolve_path(module, path)
    return parent, str(attribute), original


def check(module: ModuleType, seam: Seam) -> None:
    """Refuse a seam that is missing or that takes other parameters than the patch was written for.

    Args:
        module: imported.
        seam: its `foreign` is set to who wrapped it before us.

    Raises:
        PatchError: with what was found in its place.
    """
    try:
        original = resolve(module, seam.path)[2]
    except AttributeError:
        raise PatchError(f"{module.__name__} has no {seam.path}", found="nothing") from None
    function = getattr(original, "__func__", original)
    try:
        takes = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise PatchError(f"{module.__name__}.{seam.path} is not a function", found=repr(original)) from error
    if not seam.takes(takes):
        wanted = ", ".join(seam.parameters)
        raise PatchError(
            f"{module.__name__}.{seam.path} takes ({', '.join(takes)}), the patch knows ({wanted})",
            found=", ".join(takes),
        )
    seam.foreign = stranger(function, module)


def stranger(function: object, module: ModuleType) -> str:
    """Module of another package that put a function in place of, or around, one of `module`'s package, or "".

    Args:
        function: with the wrappers around it, ours and others.
        module: whose package it should be of.
    """
    known = {module.__name__.split(".")[0], "trainer_fsdp_patch", "torch", "safetensors", *sys.stdlib_module_names}
    while function is not None:
        for owner in () if type(function) is PatchWrapper else _owners(function):
            if owner.split(".")[0] not in known:
                return owner
        function = getattr(function, "__wrapped__", None)
    return ""


def _owners(function: object) -> list[str]:
    """Modules that a function says it is of, and is of: functools.wraps and wrapt hide the second."""
    inner = getattr(function, "_self_wrapper", function)
    inner = getattr(inner, "__func__", inner)
    named = [getattr(function, "__module__", None), getattr(inner, "__module__", None)]
    return [str(name) for name in (*named, getattr(inner, "__globals__", {}).get("__name__")) if name]


def replaced(module: ModuleType, seam: Seam) -> str:
    """Module that assigned over a live wrapper of ours, so that it is called no more, or "".

    Args:
        module: imported.
        seam: of that module.
    """
    if not seam.live:
        return ""
    try:
        raw = resolve(module, seam.path)[2]
    except AttributeError:
        return "somebody who removed it"
    if _carries(raw, seam._wrapper):
        seam.foreign = seam.foreign or stranger(raw, module)
        return ""
    function = getattr(raw, "__func__", raw)
    return stranger(function, module) or str(getattr(function, "__module__", None) or "somebody unknown")


def apply(module: ModuleType, seams: Iterable[Seam]) -> None:
    """Wrap every seam, or leave all of them as they were.

    Args:
        module: imported.
        seams: those that are live already stay.

    Raises:
        PatchError: a seam is missing or has another signature.
    """
    seams = [seam for seam in seams if not seam.live]
    for seam in seams:
        check(module, seam)
    done: list[Seam] = []
    try:
        for seam in seams:
            _write(module, seam)
            done.append(seam)
    except BaseException:
        undo(done)
        raise


def _write(module: ModuleType, seam: Seam) -> None:
    parent, attribute, original = resolve(module, seam.path)
    seam.live = True
    if seam._wrapper is not None and _carries(original, seam._wrapper):
        return
    # A wrapper that was put on before, and may be called inside what replaced it, goes silent.
    seam._turn = turn = seam._turn + 1
    place = f"{module.__name__}:{seam.path}"
    wrapper = PatchWrapper(original, seam.call, enabled=functools.partial(seam.is_active, turn), place=place)
    seam._entry = (parent, attribute, vars(parent).get(attribute, _ABSENT))
    seam._wrapper = wrapper
    setattr(parent, attribute, wrapper)


def wrap_again(module: ModuleType, seam: Seam) -> None:
    """Wrap what somebody has put in the place of a live wrapper of ours, which they may still call inside.

    Args:
        module: imported.
        seam: a live one.

    Raises:
        PatchError: theirs takes other parameters than the patch was written for.
    """
    check(module, seam)
    _write(module, seam)


def _carries(function: object, wrapper: PatchWrapper | None) -> bool:
    """Whether a function is a wrapper of ours or somebody else's that still has it inside."""
    while function is not None:
        # Who looked our wrapper up on its class holds what it is bound as.
        if function is wrapper or (isinstance(function, BoundWrapper) and function._self_parent is wrapper):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def undo(seams: Iterable[Seam]) -> None:
    """Put back the raw attributes; where somebody wrapped on top of us, go silent and leave theirs.

    Args:
        seams: in the order in which they were applied.
    """
    for seam in reversed(list(seams)):
        seam.live = False
        if seam._entry is None:
            continue
        parent, attribute, before = seam._entry
        if vars(parent).get(attribute) is not seam._wrapper:
            continue
        if before is _ABSENT:
            delattr(parent, attribute)
        else:
            setattr(parent, attribute, before)
        seam._entry = seam._wrapper = None


def depth(function: object) -> int:
    """Number of our wrappers around a raw attribute, live or silent."""
    count = 0
    while function is not None:
        count += type(function) is PatchWrapper
        function = getattr(function, "__wrapped__", None)
    return count
