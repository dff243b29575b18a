"""Attributes of an instance or module that stand in front of its own for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_ABSENT = object()


@contextlib.contextmanager
def shadowed(owner: object, **attributes: object) -> Iterator[None]:
    """Let attributes hide those of the class, or replace those of the instance, and put back what was there.

    They go past `__setattr__`, which torch modules use to sort tensors and modules into slots.

    Args:
        owner: an instance or a module with a `__dict__`.
        attributes: values by name.
    """
    held = {name: vars(owner).get(name, _ABSENT) for name in attributes}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        for name, value in held.items():
            if value is _ABSENT:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = value
