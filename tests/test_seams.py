"""The ranges of the patches against every release's wheel, and what `seams` says of the installed ones."""

from __future__ import annotations

import configparser
import inspect
import json
import linecache
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

from trainer_fsdp_patch import support, versions
from trainer_fsdp_patch.patching import registry, seams

DATA = json.loads((Path(__file__).parent / "data" / "seams.json").read_text())
# The wheels of torch are too big to be read for a few private functions; the sessions of other torches run those.
PATCHES = {
    name: patch
    for name, patch in registry.discover().items()
    if versions.package_of(patch.versions) in versions.OLDEST_SUPPORTED
}


def found(patch: registry.Patch) -> Iterator[tuple[Version, list[dict[str, Any] | None]]]:
    """Every release of a patch's package, with what its wheel has at each seam."""
    for release in DATA["releases"][versions.package_of(patch.versions)]:
        here = []
        looked = [(patch.target, seam.path) for seam in patch.seams] + ([patch.witness] if patch.witness else [])
        for target, path in looked:
            turns = DATA["seams"][f"{target}.{path}"]
            last = [turn for turn in turns if Version(turn) <= Version(release)][-1]
            here.append(turns[last])
        yield Version(release), here


@pytest.mark.parametrize("name", PATCHES)
def test_the_seams_are_as_declared_in_every_release_of_the_range(name: str) -> None:
    patch = PATCHES[name]
    inside = [(version, here) for version, here in found(patch) if versions.matches(patch.versions, version)]
    assert inside
    for version, here in inside:
        for seam, entry in zip(patch.seams, here, strict=False):
            assert entry is not None, (version, seam.path)
            if "imported" not in entry:
                assert seam.takes(tuple(entry["parameters"])), (version, seam.path)


@pytest.mark.parametrize("name", PATCHES)
def test_outside_the_range_a_seam_differs_or_is_older_than_what_is_supported(name: str) -> None:
    patch = PATCHES[name]
    oldest = Version(versions.OLDEST_SUPPORTED[versions.package_of(patch.versions)])
    inside = [here for version, here in found(patch) if versions.matches(patch.versions, version)]
    for version, here in found(patch):
        if version >= oldest and not versions.matches(patch.versions, version):
            assert here not in inside, version


def test_the_data_reaches_from_the_oldest_supported_to_the_newest_tested_release() -> None:
    for package, every in DATA["releases"].items():
        assert versions.OLDEST_SUPPORTED[package] in every[1:]
        assert versions.NEWEST_TESTED[package] in every


def test_the_window_holds_its_own_ends() -> None:
    packages = ("transformers", "accelerate", "peft")
    assert support.STACKS[0] == tuple(support.OLDEST[name] for name in packages)
    assert support.STACKS[-1] == tuple(support.PINNED[name] for name in packages)
    for package, release in support.PINNED.items():
        assert Version(release) <= Version(support.NEWEST[package])


def test_setup_and_ci_have_the_releases_of_the_window() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options.extras_require"]["test"].split("\n")[1:]

    def pinned(python: str) -> dict[str, str]:
        asked = [
            item
            for item in map(Requirement, lines)
            if not item.marker or item.marker.evaluate({"python_version": python})
        ]
        return {item.name: str(item.specifier)[2:] for item in asked if item.name in support.PINNED}

    assert pinned("3.11") == support.PINNED
    assert pinned(support.OLDEST["python"]) == support.PINNED | support.OLDEST_PYTHON
    assert config["options"]["python_requires"] == f">={support.OLDEST['python']}"
    named = [line.rpartition(" ")[2] for line in config["metadata"]["classifiers"].split("\n") if " 3." in line]
    assert (named[0], named[-1]) == (support.OLDEST["python"], support.NEWEST["python"])
    assert f"pip install torch=={support.PINNED['torch']}\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/limits.md"])
def test_the_pages_say_the_window(page: str) -> None:
    packages = ("transformers", "accelerate", "peft", "torch")
    oldest = ", ".join(f"{name} {'.'.join(support.OLDEST[name].split('.')[:2])}" for name in packages)
    assert f"{oldest}, and newer" in (ROOT / page).read_text()


def test_the_wheels_have_what_is_installed() -> None:
    for target, path, _ in seams.known():
        if target.split(".")[0] not in versions.OLDEST_SUPPORTED:
            continue
        version = versions.installed(target.split(".")[0])
        turns = DATA["seams"][f"{target}.{path}"]
        last = [turn for turn in turns if Version(turn) <= Version(version.base_version)][-1]
        assert seams.look(target, path) == turns[last], (target, path)


def test_a_function_without_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """What dataclasses made has none, though Python 3.13 would find one; nor has a release without its sources."""
    import accelerate.utils.dataclasses  # noqa: F401

    target, path = "accelerate.utils.dataclasses", "FullyShardedDataParallelPlugin.__init__"
    entry = seams.look(target, path)
    assert entry is not None
    assert entry["digest"] == seams.digest(seams.generated(entry["parameters"]))
    monkeypatch.setitem(linecache.cache, "<string>", (1, None, ["assert True\n"] * 999, "<string>"))
    assert seams.look(target, path) == entry

    def missing(function: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", missing)
    loop = seams.look("transformers.trainer", "Trainer._wrap_model")
    assert loop is not None
    assert loop["digest"] == seams.digest(seams.generated(loop["parameters"]))


def test_the_record_is_of_the_newest_tested_releases() -> None:
    record = json.loads(seams.RECORD.read_text())
    assert record["installed"] == {name: support.PINNED[name] for name in record["installed"]}
    looked = {seam: entry for seam, entry in record["seams"].items() if seam.split(".")[0] in versions.OLDEST_SUPPORTED}
    assert looked.keys() == {seam for seam, turns in DATA["seams"].items() if list(turns.values())[-1] is not None}
    for seam, entry in looked.items():
        assert entry == list(DATA["seams"][seam].values())[-1]


def test_what_moved_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    record = json.loads(seams.RECORD.read_text())
    for target, path, _ in seams.known():
        entry = seams.look(target, path)
        record["seams"].pop(f"{target}.{path}", None)
        if entry is not None:
            record["seams"][f"{target}.{path}"] = entry
    record["seams"]["transformers.trainer.Trainer._wrap_model"]["parameters"].append("mesh")
    record["seams"]["accelerate.accelerator.Accelerator.backward"]["digest"] = "0"
    record["seams"]["transformers.trainer.update_fsdp_plugin"] = {"parameters": [], "digest": "0"}
    del record["seams"]["peft.peft_model.get_peft_model_state_dict"]
    monkeypatch.setattr(seams, "RECORD", tmp_path / "seams.json")
    monkeypatch.setattr(seams, "WATCHED", (*seams.WATCHED, ("transformers.trainer", "update_fsdp_plugin")))
    seams.RECORD.write_text(json.dumps(record))
    moved = {move.seam.rpartition(".")[2]: move for move in seams.moves() if move.state != "same"}
    assert {name: move.state for name, move in moved.items()} == {
        "_wrap_model": "signature",
        "backward": "body",
        "get_peft_model_state_dict": "new",
        "update_fsdp_plugin": "gone",
    }
    assert moved["_wrap_model"].detail.endswith("dataloader, mesh) -> (self, model, training, dataloader)")
    assert moved["_wrap_model"].patches == ("transformers_v4_40_wrap_model",)
    # What is installed is as the patch knows it, whatever the record says.
    assert seams.report() == 0
    assert "4 of" in capsys.readouterr().out
    [seam] = registry.find("transformers_v4_40_wrap_model").seams
    monkeypatch.setattr(seam, "parameters", ("self", "model", "mesh"))
    assert seams.report() == 1


def test_recording_and_comparing(python: Callable[..., str], tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from trainer_fsdp_patch import cli
from trainer_fsdp_patch.patching import seams
seams.RECORD = Path({str(tmp_path / "seams.json")!r})
assert cli.main(["seams", "--record"]) == 0
assert cli.main(["seams"]) == 0
"""
    assert python(code).splitlines()[-1].startswith("0 of ")
