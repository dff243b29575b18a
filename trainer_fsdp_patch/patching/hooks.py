"""Runs something once a module is imported, and keeps its exceptions out of that import."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import wrapt


def when_imported(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call `callback(module)` after `name` is imported, at once where it already is.

    wrapt drops the other hooks of a module when one of them raises, and the import fails with it. So callbacks are
    expected to contain their own exceptions unless failing the import is the point.

    Args:
        name: dotted name of the module; it is never imported from here.
        callback: called with the module, at most once per import of it.
    """
    module = sys.modules.get(name)
    if module is not None:
        callback(module)
        return
    wrapt.register_post_import_hook(callback, name)
