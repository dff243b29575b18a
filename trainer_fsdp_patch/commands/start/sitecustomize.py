"""Python imports this at its start where `run` has put this folder first in PYTHONPATH: it calls `patch()`.

`patch()` imports no target here. It is put off until the first of them is imported, so that a program that needs none
pays next to nothing. A sitecustomize that was there before is run after this one.

Where this Python finds no trainer_fsdp_patch, as next to a checkout, it takes the one that this file is part of. The
path stays as it is.
"""

import importlib.machinery
import importlib.util
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
NAME = "trainer_fsdp_patch"


def _import_from_here() -> None:
    package = os.path.dirname(os.path.dirname(HERE))
    spec = importlib.util.spec_from_file_location(NAME, os.path.join(package, "__init__.py"))
    if spec is not None and spec.loader is not None:
        sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def _patch() -> None:
    try:
        if importlib.util.find_spec(NAME) is None:
            _import_from_here()
        import trainer_fsdp_patch

        trainer_fsdp_patch.patch()
    except Exception as error:
        text = f"trainer_fsdp_patch run: {sys.executable} was not patched, and goes on without it: {error}\n"
        sys.stderr.write(text)


def _next() -> None:
    """Run the sitecustomize that this one stands in front of, under its own name."""
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


_patch()
_next()
