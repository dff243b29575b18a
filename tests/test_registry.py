"""Ranges, states, names, switches, and what happens at the edge of what was tested."""

from __future__ import annotations

import json
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from packaging.version import Version

import trainer_fsdp_patch
from trainer_fsdp_patch import versions
from trainer_fsdp_patch.errors import PatchError, TrainerFsdpPatchWarning
from trainer_fsdp_patch.patching import registry


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a patch of a made-up package, alone in the registry."""
    patches: dict[str, registry.Patch] = {}
    found: dict[str, Version] = {}
    monkeypatch.setattr(registry, "discover", lambda: patches)
    monkeypatch.setattr(versions, "installed", found.get)
    monkeypatch.setitem(versions.NEWEST_TESTED, "upstream", "2.0")

    def make(name: str, version: str = "2.0", parameters: tuple[str, ...] = ("value",), **settings: Any) -> Any:
        module = types.ModuleType(f"trainer_fsdp_patch.patches.{name}")
        module.__doc__ = "Doubles it.\n\nArea: Training\nIssue: https://example.org/1"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        target: Any = types.ModuleType("upstream_of_tests")
        target.function = eval("lambda value: value", {"__name__": "upstream_of_tests"})
        monkeypatch.setitem(sys.modules, "upstream_of_tests", target)
        settings = {"versions": "upstream>=1.dev0,<3.dev0", "target": "upstream_of_tests", **settings}
        patch = registry.Patch(module.__name__, **settings)
        patch.wrap("function", *parameters, only=None)(lambda wrapped, instance, args, kwargs: 2 * wrapped(*args))
        patches[name] = patch
        found["upstream"] = Version(version)
        return patch, target

    yield make
    registry.unpatch()


@pytest.mark.parametrize("version", ["1.0", "1.0.dev1", "2.0rc1", "2.0+cu124"])
def test_inside_the_range(made: Any, version: str) -> None:
    patch, target = made("one", version)
    assert registry.patch()[0].state == "applied"
    assert target.function(2) == 4
    registry.unpatch()
    assert target.function(2) == 2
    assert patch.status().state == "unused"


def test_outside_the_range_names_the_release_that_fixed_it(made: Any) -> None:
    _, target = made("one", "3.0.dev0", fixed_in="upstream 3.0")
    [state] = registry.patch()
    assert state.state == "skipped"
    assert state.reason == "upstream 3.0.dev0 is outside upstream>=1.dev0,<3.dev0 (fixed in upstream 3.0)"
    assert target.function(2) == 2
    with pytest.raises(PatchError, match=r"one: upstream 3\.0\.dev0 is outside"):
        registry.patch("one")


def test_an_absent_package_is_skipped(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made("one")
    monkeypatch.setattr(versions, "installed", lambda package: None)
    assert registry.patch()[0].reason == "upstream is not installed"


def test_a_newer_release_with_the_same_seam_is_patched_with_one_warning(made: Any) -> None:
    _, target = made("one", "2.1")
    with pytest.warns(TrainerFsdpPatchWarning, match="2.1 is newer than 2.0, the newest release tested"):
        registry.patch()
    assert target.function(2) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.patch()


def test_a_moved_seam_is_left_whole_with_one_warning(made: Any) -> None:
    patch, target = made("one", "2.1", parameters=("model",))
    with pytest.warns(TrainerFsdpPatchWarning, match="one: not applied, upstream_of_tests.function takes"):
        registry.patch()
    assert patch.status().state == "failed"
    assert target.function(2) == 2


@pytest.mark.parametrize("call", [{"strict": True}, {"names": ("one",)}])
def test_strict_or_by_name_it_raises(made: Any, call: dict[str, Any]) -> None:
    made("one", parameters=("model",))
    with pytest.raises(PatchError, match="one: not applied"):
        registry.patch(*call.get("names", ()), strict=call.get("strict", False))


def test_an_unknown_name(made: Any) -> None:
    made("one")
    with pytest.raises(PatchError, match=r"two: no such patch\. Nothing was patched\. Known are one\."):
        registry.patch("two")


@pytest.mark.parametrize("value", ["one", "*", "other, one"])
def test_switched_off_by_the_environment(made: Any, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    _, target = made("one")
    monkeypatch.setenv("TRAINER_FSDP_PATCH_DISABLE", value)
    assert registry.patch()[0].reason == "switched off by TRAINER_FSDP_PATCH_DISABLE"
    assert target.function(2) == 2


FUTURES = ["2.1", "2.1.dev3", "2.1rc1", "3.0.0.post1", "2.1+git.abc", "2!1.0"]


@pytest.mark.parametrize("version", FUTURES)
@pytest.mark.parametrize("change", ["same", "changed", "gone", "a value"])
def test_releases_newer_than_any_tested(made: Any, version: str, change: str) -> None:
    """Applied where the seam is the same, else left whole, and one warning either way; strict raises for the latter."""
    patch, target = made("one", version, versions="upstream>=1.dev0")
    replacements = {"changed": lambda model, mesh: model, "a value": 3}
    if change in replacements:
        target.function = replacements[change]
    elif change == "gone":
        del target.function
    before = vars(target).get("function")
    text = "is newer than 2.0, the newest release tested" if change == "same" else "one: not applied, upstream_of_tests"
    with pytest.warns(TrainerFsdpPatchWarning, match=text) as caught:
        registry.patch()
    assert len(caught) == 1
    assert patch.status().state == ("applied" if change == "same" else "failed")
    if change != "same":
        assert vars(target).get("function") is before
    registry.unpatch()
    if change == "same":
        with pytest.warns(TrainerFsdpPatchWarning, match=text):
            assert registry.patch(strict=True)[0].state == "applied"
        return
    with pytest.raises(PatchError, match="one: not applied"):
        registry.patch(strict=True)
    assert vars(target).get("function") is before
    assert patch.status().state == "failed"


@pytest.mark.parametrize("parameters", [None, ("model",)], ids=["untested", "moved"])
def test_a_filter_that_makes_warnings_errors_gets_a_line_in_the_log(
    made: Any, caplog: pytest.LogCaptureFixture, parameters: tuple[str, ...] | None
) -> None:
    """The warning may come inside of an import of upstream's, which must not fail by it."""
    _, target = made("one", "2.1", **({"parameters": parameters} if parameters else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.patch()
    [line] = caplog.records
    assert ("is newer than 2.0" if parameters is None else "one: not applied") in line.message
    assert target.function(2) == (4 if parameters is None else 2)


@pytest.mark.parametrize("version", ["not a version", "", None, "1.0.0-"])
def test_broken_metadata_counts_as_not_installed(
    made: Any, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    _, target = made("one")
    monkeypatch.undo()
    versions.installed.cache_clear()
    monkeypatch.setattr(versions, "_version", lambda distribution: version)
    assert versions.installed("transformers") is None
    versions.installed.cache_clear()
    assert target.function(2) == 2


def test_what_does_it_in_a_later_release_is_named(made: Any) -> None:
    made("up_v1_0_seam", "2.0", versions="upstream>=1.dev0,<1.5.dev0")
    made("up_v1_5_seam", "2.0", versions="upstream>=1.5.dev0")
    old, new = registry.patch()
    assert (old.state, new.state) == ("skipped", "applied")
    assert old.reason == "upstream 2.0 is outside upstream>=1.dev0,<1.5.dev0 (up_v1_5_seam does it there)"


def test_a_need_of_other_releases_does_not_hold_a_patch_back(made: Any) -> None:
    made("old", versions="upstream<1.dev0", target="another")
    _, target = made("one", alongside=("old",))
    assert [state.state for state in registry.patch()] == ["skipped", "applied"]
    assert target.function(2) == 4


def test_a_need_of_this_release_that_was_switched_off_holds_a_patch_back(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("beside", target="another")
    _, target = made("one", alongside=("beside",))
    monkeypatch.setenv("TRAINER_FSDP_PATCH_DISABLE", "beside")
    registry.patch()
    assert registry.status()[1].reason == "stands back until beside is applied"
    assert target.function(2) == 2


def test_a_patch_that_somebody_assigned_over_has_failed(made: Any) -> None:
    _, target = made("one")
    registry.patch()
    target.function = eval("lambda value: 0", {"__name__": "unsloth.models"})
    assert registry.status()[0].state == "failed"
    assert registry.status()[0].reason == "unsloth.models replaced a seam after us"


def test_a_patch_stands_back_without_what_it_needs(made: Any) -> None:
    _, target = made("one", needs=("two",))
    made("two", versions="upstream<1.dev0", target="another")
    assert [state.state for state in registry.patch()] == ["waiting", "skipped"]
    assert registry.status()[0].reason == "stands back until two is applied"
    assert target.function(2) == 2


def test_two_patches_of_one_seam_are_refused(made: Any) -> None:
    one, _ = made("one")
    two, _ = made("two")
    with pytest.raises(PatchError, match=r"two and one both wrap upstream_of_tests\.function"):
        registry.refuse_overlaps([one, two])


def test_ranges_of_neighbours_leave_no_hole() -> None:
    for version in ("1.11.0", "1.11.0.dev0", "1.11.0rc1", "1.10.9", "1.11.0+local"):
        sides = [versions.matches(f"upstream{bound}", Version(version)) for bound in ("<1.11.dev0", ">=1.11.dev0")]
        assert sum(sides) == 1


def test_unreadable_metadata_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    versions.installed.cache_clear()
    monkeypatch.setattr(versions, "_version", lambda distribution: "not a version")
    assert versions.installed("transformers") is None
    versions.installed.cache_clear()


def test_the_real_patches_that_concern_what_is_installed_are_applied() -> None:
    import peft  # noqa: F401
    import torch.distributed.checkpoint.state_dict  # noqa: F401
    import transformers.trainer  # noqa: F401

    states = trainer_fsdp_patch.patch(strict=True)
    assert {state.state for state in states if "is outside" not in state.reason} == {"applied"}
    assert sum(state.state == "applied" for state in states) >= 9


def test_stripped_docstrings_are_read_from_the_source() -> None:
    """`python -OO` strips them, and `status` would say nothing of what a patch does."""
    program = "import json, trainer_fsdp_patch as t; print(json.dumps([[s.effect, s.issue] for s in t.status()]))"
    printed = [
        subprocess.run([sys.executable, *flags, "-c", program], capture_output=True, text=True, check=True).stdout
        for flags in ((), ("-OO",))
    ]
    assert printed[0] == printed[1]
    assert all(effect and issue.startswith("https://") for effect, issue in json.loads(printed[0]))


def test_warnings_as_errors_do_not_fail_an_import_of_upstream() -> None:
    program = (
        "from trainer_fsdp_patch import versions; versions.NEWEST_TESTED['transformers'] = '4.0';"
        "import trainer_fsdp_patch; trainer_fsdp_patch.patch(); import transformers.trainer;"
        "print(sum(s.state == 'applied' for s in trainer_fsdp_patch.status()))"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", program]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) > 5
    assert "transformers: " in finished.stderr
    assert "newest release tested" in finished.stderr
