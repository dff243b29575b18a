"""Patches: how one is declared, which of them apply to what is installed, and the state of each."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType

from trainer_fsdp_patch import hooks, versions, wrapping
from trainer_fsdp_patch.errors import PatchError, TrainerFsdpPatchWarning, message

logger = logging.getLogger("trainer_fsdp_patch")

PACKAGE = "trainer_fsdp_patch.patches"
DISABLE = "TRAINER_FSDP_PATCH_DISABLE"
"""Environment variable: names of patches, separated by commas, that `patch()` leaves out; `*` is all."""

UNUSED, WAITING, APPLIED, SKIPPED, FAILED = "unused", "waiting", "applied", "skipped", "failed"


@dataclass(frozen=True)
class Status:
    """State of one patch.

    Attributes:
        name: module name below `patches/`.
        state: unused (patch() was not called), waiting (its target is not imported yet), applied,
            skipped (does not concern what is installed, or was switched off), or failed.
        reason: why, in one sentence, or "".
        versions: range of releases that the patch repairs.
        fixed_in: upstream release that made it unnecessary, or "".
        effect: what the patch does.
        upstream: address of the upstream source or issue.
        foreign: package that had replaced a seam before us, or "".
    """

    name: str
    state: str
    reason: str
    versions: str
    fixed_in: str
    effect: str
    upstream: str
    foreign: str


class Patch:
    """Declaration of one patch, made once at the top of its module.

    Args:
        module: `__name__` of the patch module; its docstring gives the effect and, behind
            `Upstream: `, the address of the source or issue.
        versions: PEP 440 range of the releases that have the fault, such as
            `accelerate>=1.6.dev0,<1.15.dev0`; the one declaration of that range.
        target: module to wait for; never imported by us.
        fixed_in: release that repaired the fault, or None while upstream is open.
        needs: names of patches without which this one would do harm.
    """

    def __init__(
        self,
        module: str,
        *,
        versions: str,
        target: str,
        fixed_in: str | None = None,
        needs: tuple[str, ...] = (),
    ) -> None:
        self.name = module.rsplit(".", 1)[-1]
        self.versions, self.target, self.fixed_in, self.needs = versions, target, fixed_in, needs
        documentation = (sys.modules[module].__doc__ or "").strip()
        self.effect = documentation.split("\n", 1)[0]
        self.upstream = documentation.partition("Upstream: ")[2].split("\n", 1)[0].strip()
        self.seams: list[wrapping.Seam] = []
        self.state, self.reason, self.error = UNUSED, "", None
        self.wanted = self.hooked = self.strict = False

    def wrap(self, path: str, *parameters: str) -> Callable[[wrapping.WrapperFunction], wrapping.WrapperFunction]:
        """Put the decorated function, in wrapt's four-argument form, around `path` of the target.

        Args:
            path: dotted path inside the target module.
            parameters: names of the upstream function's parameters, in order.
        """

        def add(function: wrapping.WrapperFunction) -> wrapping.WrapperFunction:
            self.seams.append(wrapping.Seam(path, parameters, function, self.is_complete))
            return function

        return add

    def is_complete(self) -> bool:
        """Whether every patch that this one needs is applied too."""
        return all(find(name).state == APPLIED for name in self.needs)

    def status(self) -> Status:
        if self.state == APPLIED and not self.is_complete():
            missing = [name for name in self.needs if find(name).state != APPLIED]
            state, reason = WAITING, f"stands back until {', '.join(missing)} is applied"
        else:
            state, reason = self.state, self.reason
        foreign = ", ".join(sorted({seam.foreign for seam in self.seams} - {""}))
        return Status(self.name, state, reason, self.versions, self.fixed_in or "", self.effect, self.upstream, foreign)


@functools.cache
def discover() -> dict[str, Patch]:
    """Every patch module of `patches/`, by name.

    Raises:
        PatchError: two patches claim the same seam for overlapping releases.
    """
    package = importlib.import_module(PACKAGE)
    found = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        patch = importlib.import_module(f"{PACKAGE}.{info.name}").patch
        found[patch.name] = patch
    refuse_overlaps(found.values())
    return found


def refuse_overlaps(patches: Iterable[Patch]) -> None:
    """Refuse two patches of one seam whose ranges both hold for what is installed.

    Raises:
        PatchError: naming both.
    """
    owner: dict[tuple[str, str], Patch] = {}
    for patch in patches:
        version = versions.installed(versions.package_of(patch.versions))
        if version is None or not versions.matches(patch.versions, version):
            continue
        for seam in patch.seams:
            other = owner.setdefault((patch.target, seam.path), patch)
            if other is not patch:
                raise PatchError(f"{patch.name} and {other.name} both wrap {patch.target}.{seam.path}")


def find(name: str) -> Patch:
    """Patch of that name.

    Raises:
        PatchError: there is none.
    """
    try:
        return discover()[name]
    except KeyError:
        known = ", ".join(discover())
        text = message(name, "no such patch", "Nothing was patched", f"Known are {known}")
        raise PatchError(text, patch=name) from None


def patch(*names: str, strict: bool = False) -> list[Status]:
    """Repair what is installed; see `trainer_fsdp_patch.patch`."""
    wanted = [find(name) for name in names] or list(discover().values())
    for item in wanted:
        wanted.extend(other for other in map(find, item.needs) if other not in wanted)
    disabled = {name.strip() for name in os.environ.get(DISABLE, "").split(",")}
    for item in wanted:
        reason = _inapplicable(item, disabled)
        if reason and item.name in names:
            raise PatchError(f"{item.name}: {reason}.", patch=item.name, found=reason)
        if reason:
            item.state, item.reason = SKIPPED, reason
            logger.debug("%s: skipped, %s.", item.name, reason)
            continue
        item.strict = strict or item.name in names
        item.wanted = True
        if item.state != APPLIED:
            item.state, item.reason = WAITING, f"waits for {item.target} to be imported"
            _hook(item)
    return status()


def _inapplicable(item: Patch, disabled: set[str]) -> str:
    package = versions.package_of(item.versions)
    version = versions.installed(package)
    if item.name in disabled or "*" in disabled:
        return f"switched off by {DISABLE}"
    if version is None:
        return f"{package} is not installed"
    if not versions.matches(item.versions, version):
        fixed = f" (fixed in {item.fixed_in})" if item.fixed_in else ""
        return f"{package} {version} is outside {item.versions}{fixed}"
    return ""


def _hook(item: Patch) -> None:
    if item.hooked and item.target not in sys.modules:
        return
    item.hooked = True
    hooks.when_imported(item.target, functools.partial(_apply, item))


def _apply(item: Patch, module: ModuleType) -> None:
    """Apply one patch to its imported target; a failure is kept out of the user's import unless strict."""
    if not item.wanted or item.state == APPLIED:
        return
    package = versions.package_of(item.versions)
    version = versions.installed(package)
    try:
        wrapping.apply(module, item.seams)
    except Exception as error:
        item.state, item.reason = FAILED, f"{error} in {package} {version}"
        text = message(
            item.name,
            f"not applied, {error} in {package} {version}",
            f"The run continues without it: {item.effect[:1].lower()}{item.effect[1:].rstrip('.')} does not happen",
            "Report this version",
        )
        if item.strict:
            raise PatchError(text, patch=item.name, found=str(error)) from error
        warnings.warn(text, TrainerFsdpPatchWarning, stacklevel=2)
        return
    item.state, item.reason = APPLIED, ""
    if versions.newer_than_tested(package):
        _warn_untested(package, str(version), item.strict)


@functools.cache
def _warn_untested(package: str, version: str, strict: bool) -> None:
    text = message(
        package,
        f"{version} is newer than {versions.NEWEST_TESTED[package]}, the newest release tested",
        "The seams have the signatures that the patches know, so the patches are applied",
        "Run `python -m trainer_fsdp_patch check` to see that they hold",
    )
    if strict:
        raise PatchError(text, found=version)
    warnings.warn(text, TrainerFsdpPatchWarning, stacklevel=3)


def unpatch() -> None:
    """Undo every patch; see `trainer_fsdp_patch.unpatch`."""
    for item in reversed(list(discover().values())):
        item.wanted = False
        wrapping.undo(item.seams)
        item.state, item.reason = UNUSED, ""
    _warn_untested.cache_clear()


def status() -> list[Status]:
    """State of every patch; see `trainer_fsdp_patch.status`."""
    return [item.status() for item in discover().values()]
