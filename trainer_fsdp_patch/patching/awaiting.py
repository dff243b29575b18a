"""Puts `patch()` off until the first of its targets is about to be imported.

A program that imports none of them pays for this module alone. No patch, no wrapt and no packaging is loaded.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from trainer_fsdp_patch.patching.registry import Status

ROOTS = ("accelerate", "peft", "torch", "transformers")
"""Packages that the targets of all patches lie in."""

DISABLE = "TRAINER_FSDP_PATCH_DISABLE"
"""Environment variable: names of patches, separated by commas, that `patch()` leaves out; `all` or `*` is all."""

_ARMED: list[_Finder] = []


class _Finder:
    """Finds no module itself: it is asked before all others, and has the patches hooked in time.

    A hook that runs after `import torch` comes too late. accelerate's own modules import torch, and whoever looked
    then would see them half imported.

    Args:
        disabled: value of the environment variable when `patch()` was called.
    """

    def __init__(self, disabled: str) -> None:
        self.disabled = disabled

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname not in ROOTS:
            return None
        try:
            fire()
        except Exception as error:
            from trainer_fsdp_patch.errors import warn_in_import

            text = f"patch() failed when {fullname} was imported, and the run continues without it: {error}"
            warn_in_import(text)
        # The hooks of wrapt have come in front of this finder by now, and the import has passed that place.
        return importlib.util.find_spec(fullname)


class Statuses(Sequence["Status"]):
    """What `patch()` returns: the states of all patches, looked up when they are first read, and shown as one line.

    Args:
        read: the states, where they are known already.
    """

    def __init__(self, read: list[Status] | None = None) -> None:
        self._read = read

    def _states(self) -> list[Status]:
        if self._read is None:
            from trainer_fsdp_patch.patching import registry

            fire()
            self._read = registry.status()
        return self._read

    @overload
    def __getitem__(self, index: int) -> Status: ...
    @overload
    def __getitem__(self, index: slice) -> list[Status]: ...
    def __getitem__(self, index: int | slice) -> Status | list[Status]:
        return self._states()[index]

    def __iter__(self) -> Iterator[Status]:
        return iter(self._states())

    def __len__(self) -> int:
        return len(self._states())

    def __eq__(self, other: object) -> bool:
        return self._states() == (list(other) if isinstance(other, (Statuses, list)) else other)

    def __repr__(self) -> str:
        from trainer_fsdp_patch.patching import showing

        return f"trainer_fsdp_patch: {showing.summary(self)}; status() lists them"


def possible() -> bool:
    """Whether nothing has to be patched yet: no target is imported, and no patch is hooked."""
    hooked = "trainer_fsdp_patch.patching.registry" in sys.modules
    return not hooked and not any(root in sys.modules for root in ROOTS)


def arm() -> Statuses:
    """Have `patch()` done when a target is about to be imported, or when its result is read."""
    if not _ARMED:
        _ARMED.append(_Finder(os.environ.get(DISABLE, "")))
        sys.meta_path.insert(0, _ARMED[0])
    return Statuses()


def disarm() -> _Finder | None:
    """Take the request back; None where there is none."""
    if not _ARMED:
        return None
    finder = _ARMED.pop()
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)
    return finder


def fire() -> None:
    """Do what `patch()` has put off, if it has."""
    finder = disarm()
    if finder is not None:
        from trainer_fsdp_patch.patching import registry

        registry.patch(disabled=finder.disabled)
