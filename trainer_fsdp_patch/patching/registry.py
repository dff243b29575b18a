"""Patches: how one is declared, which of them apply to what is installed, and the state of each."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.errors import PatchError, message, warn, warn_in_import, warn_text
from trainer_fsdp_patch.patching import hooks, prewrapped, showing, switches, wrapping
from trainer_fsdp_patch.patching.awaiting import DISABLE
from trainer_fsdp_patch.patching.documentation import documentation

logger = logging.getLogger("trainer_fsdp_patch")

PACKAGE = "trainer_fsdp_patch.patches"

AREAS = ("Start-up", "Training", "Saving", "Resuming")
LINES = ("Area", "Issue", "Can be removed when")

NEWER = "{} is newer than {}, the newest release tested"
UNUSED, WAITING, APPLIED, SKIPPED, FAILED = "unused", "waiting", "applied", "skipped", "failed"


@dataclass(frozen=True)
class Status:
    """State of one patch.

    Attributes:
        name: module name below `patches/`.
        state: unused (patch() was not called), waiting (its target is not imported yet), applied, skipped or failed.
            Skipped are those that do not concern what is installed, or were switched off.
        reason: why, in one sentence, or "".
        versions: range of releases that the patch repairs.
        fixed_in: upstream release that made it unnecessary, or "".
        effect: what the patch does.
        area: when it acts, one of `AREAS`.
        issue: address of the upstream issue, pull request or source.
        removal: what must be true before the patch can be removed.
        foreign: modules of other packages that have wrapped or replaced a seam, or "".
        late: classes of models that FSDP had wrapped already when `patch()` came, or "".
    """

    name: str
    state: str
    reason: str
    versions: str
    fixed_in: str
    effect: str
    area: str
    issue: str
    removal: str
    foreign: str
    late: str


class Patch:
    """Declaration of one patch, made once at the top of its module.

    Args:
        module: `__name__` of the patch module. Its docstring gives the effect, and the lines `Area: `, `Issue: ` and
            `Can be removed when: `.
        versions: PEP 440 range of the releases that have the fault, such as `accelerate>=1.6.dev0,<1.15.dev0`. It is
            declared here alone.
        target: module to wait for; never imported by us.
        fixed_in: release that repaired the fault, or None while upstream is open.
        needs: names of patches without which this one would do harm.
        alongside: the same, of patches that do not concern every supported release.
        vital: whether a plan is wrong without it, so that a function put in its place matters at once. Others may be
            replaced by somebody's own that calls them.
        witness: upstream function whose body has the fault, where that is not a wrapped one. `seams` watches it, and
            the range is held against it.
    """

    def __init__(
        self,
        module: str,
        *,
        versions: str,
        target: str,
        fixed_in: str | None = None,
        needs: tuple[str, ...] = (),
        alongside: tuple[str, ...] = (),
        vital: bool = False,
        witness: tuple[str, str] | None = None,
    ) -> None:
        self.name = module.rsplit(".", 1)[-1]
        self.versions, self.target, self.fixed_in = versions, target, fixed_in
        self.needs, self.alongside, self.vital, self.witness = needs, alongside, vital, witness
        text = documentation(sys.modules[module])
        self.effect = text.split("\n", 1)[0]
        lines = dict(line.partition(": ")[::2] for line in text.splitlines())
        self.area, self.issue, self.removal = (lines.get(name, "") for name in LINES)
        self.seams: list[wrapping.Seam] = []
        self.state, self.reason = UNUSED, ""
        self.wanted = self.hooked = self.strict = False
        self.late = ""

    def wrap(
        self, path: str, *parameters: str, only: wrapping.Gate | None
    ) -> Callable[[wrapping.WrapperFunction], wrapping.WrapperFunction]:
        """Put the decorated function, in wrapt's four-argument form, around `path` of the target.

        Args:
            path: dotted path inside the target module.
            parameters: names of the upstream function's parameters, in order; "..." at the end is any others.
            only: which calls the function gets, of `gates`; all others go upstream as they came. None is all calls.
        """

        def add(function: wrapping.WrapperFunction) -> wrapping.WrapperFunction:
            self.seams.append(wrapping.Seam(path, parameters, function, self.is_complete, only))
            return function

        return add

    def concerns(self) -> bool:
        """Whether the range holds for what is installed."""
        version = versions.installed(versions.package_of(self.versions))
        return version is not None and versions.matches(self.versions, version)

    def required(self) -> list[Patch]:
        """Patches without which this one would do harm with what is installed."""
        return [find(name) for name in self.needs] + [item for item in map(find, self.alongside) if item.concerns()]

    def is_complete(self) -> bool:
        """Whether every patch that this one needs is applied too."""
        return all(item.state == APPLIED for item in self._required)

    def stands(self) -> bool:
        """Whether the vital patches among those that it needs are in place; what was assigned over is wrapped again.

        Said once for each seam. Where one cannot be wrapped again, all of the patch stands back from this run.
        """
        standing = [_reclaimed(item, seam) for item in self._required if item.vital for seam in item.seams]
        return all(standing)

    @functools.cached_property
    def _required(self) -> list[Patch]:
        return self.required()

    def status(self) -> Status:
        if self.state == APPLIED and not self.is_complete():
            missing = [item.name for item in self.required() if item.state != APPLIED]
            state, reason = WAITING, f"stands back until {', '.join(missing)} is applied"
        else:
            state, reason = self.state, self.reason
        module = sys.modules.get(self.target)
        others = [] if module is None else [wrapping.replaced(module, seam) for seam in self.seams]
        if any(others):
            state, reason = FAILED, f"{next(filter(None, others))} replaced a seam after us"
        foreign = ", ".join(sorted({seam.foreign for seam in self.seams} - {""}))
        declared = self.versions, self.fixed_in or "", self.effect, self.area, self.issue, self.removal
        return Status(self.name, state, reason, *declared, foreign, self.late if state == APPLIED else "")


@functools.cache
def discover() -> dict[str, Patch]:
    """Every patch module of `patches/`, by name.

    Raises:
        PatchError: two patches claim the same seam for overlapping releases.
    """
    package = importlib.import_module(PACKAGE)
    patches = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        patch = importlib.import_module(f"{PACKAGE}.{info.name}").patch
        patches[patch.name] = patch
    refuse_overlaps(patches.values())
    return patches


def refuse_overlaps(patches: Iterable[Patch]) -> None:
    """Refuse two patches of one seam whose ranges both hold for what is installed.

    Raises:
        PatchError: naming both.
    """
    owner: dict[tuple[str, str], Patch] = {}
    for patch in patches:
        if not patch.concerns():
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
        raise PatchError(name, "no such patch", "Nothing was patched", f"Known are {known}", patch=name) from None


def patch(*names: str, strict: bool = False, disabled: str | None = None) -> list[Status]:
    """Repair what is installed; see `trainer_fsdp_patch.patch`.

    Args:
        names: of patches.
        strict: as there.
        disabled: names of patches to leave out, separated by commas; None is what the environment says.
    """
    wanted = [find(name) for name in names] or list(discover().values())
    for item in wanted:
        wanted.extend(other for other in item.required() if other not in wanted)
    left_out = switches.left_out(os.environ.get(DISABLE, "") if disabled is None else disabled)
    late = ", ".join(prewrapped.models()) if any(item.state == UNUSED for item in wanted) else ""
    if late:
        _warn_late(late, strict)
    for item in wanted:
        reason = _inapplicable(item, left_out)
        if reason and item.name in names:
            raise PatchError(f"{item.name}: {reason}.", patch=item.name, found=reason)
        if reason:
            item.state, item.reason = SKIPPED, reason
            logger.debug("%s: skipped, %s.", item.name, reason)
            continue
        item.strict = strict or item.name in names
        item.wanted = True
        if item.state != APPLIED:
            item.state, item.reason, item.late = WAITING, f"waits for {item.target} to be imported", late
            _hook(item)
    return status()


def _inapplicable(item: Patch, disabled: set[str]) -> str:
    package = versions.package_of(item.versions)
    version = versions.installed(package)
    if item.name in disabled:
        return f"switched off by {DISABLE}"
    if version is None:
        return f"{package} is not installed"
    if not versions.matches(item.versions, version):
        fixed = f" (fixed in {item.fixed_in})" if item.fixed_in else ""
        heirs = [other.name for other in discover().values() if other.concerns() and _same_noun(item, other)]
        heir = f" ({heirs[0]} does it there)" if heirs and not fixed else ""
        return f"{package} {version} is outside {item.versions}{fixed}{heir}"
    return ""


def _same_noun(one: Patch, other: Patch) -> bool:
    noun = [re.sub(r"_v\d+_\d+", "", item.name) for item in (one, other)]
    return noun[0] == noun[1]


def _warn_late(late: str, strict: bool) -> None:
    text = message(
        "patch()",
        f"{late} wrapped by FSDP already",
        "What is prepared from now on is repaired; those models are as upstream left them",
        "Call patch() before the Trainer trains or evaluates",
    )
    if strict:
        raise PatchError(text, found=late)
    warn_text(text)


def _reclaimed(item: Patch, seam: wrapping.Seam) -> bool:
    module = sys.modules.get(item.target)
    owner = "" if module is None else wrapping.replaced(module, seam)
    if module is None or not owner:
        return True
    place = f"{item.target}.{seam.path}"
    try:
        wrapping.wrap_again(module, seam)
    except PatchError as error:
        why = f"The patches stand back from this run: {error}"
        remedy = "Leave their function out, or do not call patch()"
        warn(place, f"{owner} has replaced it", why, remedy)
        return False
    warn(place, f"{owner} has replaced it", "It is wrapped again, theirs inside", "Call patch() after theirs")
    return True


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
        warn_in_import(text)
        return
    item.state, item.reason = APPLIED, ""
    if versions.newer_than_tested(package):
        _warn_untested(package, str(version))


@functools.cache
def _warn_untested(package: str, version: str) -> None:
    text = message(
        package,
        NEWER.format(version, versions.NEWEST_TESTED[package]),
        "The seams have the signatures that the patches know, so the patches are applied",
        "Run `python -m trainer_fsdp_patch check` to see that they hold",
    )
    warn_in_import(text)


def unpatch() -> None:
    """Undo every patch; see `trainer_fsdp_patch.unpatch`."""
    for item in reversed(list(discover().values())):
        item.wanted = False
        wrapping.undo(item.seams)
        item.state, item.reason = UNUSED, ""
    _warn_untested.cache_clear()


def status() -> list[Status]:
    """State of every patch; see `trainer_fsdp_patch.status`."""
    return showing.States(item.status() for item in discover().values())
