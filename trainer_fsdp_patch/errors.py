"""Errors and the warning of this package, and the one shape that their messages have."""

from __future__ import annotations

import warnings


class TrainerFsdpPatchError(RuntimeError):
    """Base of every error raised by this package; it makes its own text.

    Args:
        subject: which patch, setting or tensor; or the whole text, where nothing else is given.
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
    """One line: `subject: found. consequence. remedy.`, each given without its full stop."""
    return f"{subject}: {found}. {consequence}. {remedy}."


def warn(subject: str, found: str, consequence: str, remedy: str) -> None:
    """Warn in the shape of `message`, as coming from the code that trains."""
    warnings.warn(message(subject, found, consequence, remedy), TrainerFsdpPatchWarning, stacklevel=5)
