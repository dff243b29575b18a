"""Errors and the warning of this package, and the one shape that their messages have."""

from __future__ import annotations

import logging
import sys
import warnings


class TrainerFsdpPatchError(RuntimeError):
    """Base of every error raised by this package; it makes its own text.

    Args:
        subject: which patch, setting or tensor; or the full text, where nothing else is given.
        found: what was found.
        consequence: what follows.
        remedy: what to do.
    """

    def __init__(self, subject: str, found: str = "", consequence: str = "", remedy: str = "") -> None:
        super().__init__(message(subject, found, consequence, remedy) if found else subject)


class PatchError(TrainerFsdpPatchError):
    """A patch that was asked for by name, or in strict mode, does not apply.

    Attributes:
        patch: name of the patch.
        found: what was found in its place.
    """

    def __init__(self, *text: str, patch: str = "", found: str = "") -> None:
        super().__init__(*text)
        self.patch = patch
        self.found = found


class PlanError(TrainerFsdpPatchError, ValueError):
    """A setting or a model contradicts the plan; nothing has been changed.

    Attributes:
        setting: name of the setting, argument or tensor that contradicts.
    """

    def __init__(self, *text: str, setting: str = "") -> None:
        super().__init__(*text)
        self.setting = setting


class AdapterError(TrainerFsdpPatchError):
    """The adapter is not what it has to be: ranks differ, or it is empty, partial or not finite.

    Attributes:
        tensor: canonical name of the first tensor at fault, or "".
    """

    def __init__(self, *text: str, tensor: str = "") -> None:
        super().__init__(*text)
        self.tensor = tensor


class RankError(TrainerFsdpPatchError):
    """Another rank has ended or does not answer, so that a collective of ours cannot be completed."""


class TrainerFsdpPatchWarning(UserWarning):
    """The run goes on, but differs from what was asked for or tested."""


def message(subject: str, found: str, consequence: str, remedy: str) -> str:
    """One line: `subject: found. consequence. remedy.`, each given without its full stop.

    Args:
        subject: which patch, setting or tensor.
        found: what was found.
        consequence: what follows.
        remedy: what to do.
    """
    return f"{subject}: {found}. {consequence}. {remedy}."


def warn(subject: str, found: str, consequence: str, remedy: str) -> None:
    """Warn in the shape of `message`, as coming from the user's own line.

    Args:
        subject: which patch, setting or tensor.
        found: what was found.
        consequence: what follows.
        remedy: what to do.
    """
    warn_text(message(subject, found, consequence, remedy))


def warn_in_import(text: str) -> None:
    """Warn while somebody imports a module of upstream's.

    A filter that makes warnings errors would fail that import, and leave patches behind it out. The text is logged
    there instead.

    Args:
        text: of the warning.
    """
    try:
        warn_text(text)
    except TrainerFsdpPatchWarning:
        logging.getLogger("trainer_fsdp_patch").warning("%s", text)


_BETWEEN = frozenset(
    {
        "trainer_fsdp_patch",
        "accelerate",
        "peft",
        "torch",
        "transformers",
        "wrapt",
        "contextlib",
        "functools",
        "importlib",
    }
)
"""Packages whose frames lie between a warning and the user's line; the last three belong to decorators and imports."""


def warn_text(text: str) -> None:
    """Warn as coming from the user's own line: the innermost frame that is neither ours nor upstream's.

    No constant stacklevel finds it. The depth depends on the release of upstream, on decorators, and on who calls.
    Python has `skip_file_prefixes` for this from 3.12 on.

    Args:
        text: of the warning. A filter that makes it an error raises it.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        frame = frame.f_back
    # By the registry of a module, python shows a warning once for each of its lines.
    warnings.warn_explicit(
        text,
        TrainerFsdpPatchWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
