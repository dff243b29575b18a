"""Installed versions and version ranges: the only place that touches packaging and importlib.metadata."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from trainer_fsdp_patch import support

if TYPE_CHECKING:
    from importlib.metadata import Distribution

    from packaging.version import Version

NEWEST_TESTED = {package: release for package, release in support.NEWEST.items() if package != "python"}
"""Newest release of each target that this package was tested on."""

OLDEST_SUPPORTED = {package: support.OLDEST[package] for package in ("accelerate", "peft", "transformers")}
"""Oldest supported release of each package whose functions are wrapped, but for torch."""


@functools.cache
def installed(package: str) -> Version | None:
    """Version of an installed distribution, or None where it is absent or its metadata is unreadable."""
    import importlib.metadata

    from packaging.version import InvalidVersion, Version

    try:
        return Version(_version(importlib.metadata.distribution(package)))
    except (importlib.metadata.PackageNotFoundError, InvalidVersion, TypeError):
        return None


def _version(distribution: Distribution) -> str:
    """Version in the head of a distribution's metadata; the parser behind `.version` reads the description too."""
    head = (distribution.read_text("METADATA") or "").partition("\n\n")[0]
    lines = (line.partition(":") for line in head.splitlines())
    return next((value.strip() for key, _, value in lines if key == "Version"), None) or distribution.version


@functools.cache
def package_of(requirement: str) -> str:
    """Distribution that a range such as `accelerate>=1.6.dev0,<1.15.dev0` speaks of."""
    return requirement[: _operator(requirement)].strip()


def _operator(requirement: str) -> int:
    """Place of the first operator. packaging's parser of full requirements takes longer to import than all else."""
    return min((place for place in map(requirement.find, "<>=!~") if place > 0), default=len(requirement))


@functools.cache
def matches(requirement: str, version: Version) -> bool:
    """Whether a version lies in a range; pre-releases and local versions count like any other.

    The default for pre-releases changed in packaging 26.0, so it is always passed.

    Args:
        requirement: a range such as `torch>=2.2`.
        version: of the package that it names.
    """
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(requirement[_operator(requirement) :]).contains(version, prereleases=True)


def at_least(package: str, release: str) -> bool:
    """Whether the installed release of a package is `release` or newer.

    Args:
        package: name of the distribution.
        release: such as "1.15.0".
    """
    version = installed(package)
    return version is not None and matches(f"{package}>={release}", version)


def newer_than_tested(package: str) -> bool:
    """Whether the installed release is newer than the newest one tested."""
    from packaging.version import Version

    version = installed(package)
    tested = NEWEST_TESTED.get(package)
    return version is not None and tested is not None and Version(version.public) > Version(tested)


def untested() -> dict[str, str]:
    """Packages whose installed release is newer than the newest one tested, and that release."""
    return {package: str(installed(package)) for package in NEWEST_TESTED if newer_than_tested(package)}


def missing() -> list[str]:
    """Packages that the patches wrap and that are not installed."""
    return [name for name in ("torch", "transformers", "accelerate", "peft") if installed(name) is None]
