"""The docstring of a patch module, which is what `status` and docs/patches.md say of it."""

from __future__ import annotations

from types import ModuleType
from typing import Any


def documentation(module: ModuleType) -> str:
    """Docstring of a module; it is read from the source where `python -OO` has stripped it.

    Args:
        module: imported.

    Returns:
        The text, or "" where there is neither.
    """
    if module.__doc__ is not None:
        return module.__doc__.strip()
    loader: Any = module.__spec__.loader if module.__spec__ else None
    source = loader.get_source(module.__name__) if hasattr(loader, "get_source") else None
    if not source:
        return ""
    # Whoever runs python without -OO does not pay for this import.
    import ast

    return ast.get_docstring(ast.parse(source)) or ""
