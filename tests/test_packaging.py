"""The built wheel and sdist, and the checkout, all hold and import the patches."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATCHES = sorted(path.name for path in (ROOT / "patches").glob("*.py"))
IGNORED = shutil.ignore_patterns(".git", ".nox", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
IMPORT = """
import trainer_fsdp_patch, trainer_fsdp_patch.patches as p
print(p.__file__, *[state.name for state in trainer_fsdp_patch.status()])
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist and the wheel made from it."""
    source = tmp_path_factory.mktemp("source") / "project"
    shutil.copytree(ROOT, source, ignore=IGNORED)
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(source)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


def test_the_wheel_holds_every_patch_and_nothing_else_at_the_top(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(name.split("/")[-1] for name in names if name.startswith("trainer_fsdp_patch/patches/")) == PATCHES
    assert {name.split("/")[0].split("-")[0] for name in names} == {"trainer_fsdp_patch"}
    assert "trainer_fsdp_patch/py.typed" in names
    assert not any("tests" in name for name in names)


def test_what_an_index_shows_and_what_the_wheel_holds_is_sound(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    files = [str(path) for path in built.iterdir()]
    for command in (["twine", "check", "--strict", *files], ["check_wheel_contents", str(wheel)]):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_wheel_that_is_built_again_has_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for folder in ("first", "second"):
        source = tmp_path / folder
        shutil.copytree(ROOT, source, ignore=IGNORED)
        # What a build of another day finds: files that were written at another time.
        for path in source.rglob("*"):
            os.utime(path, (len(made) * 10**6, 10**9 + len(made) * 10**6))
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(source)]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        [wheel] = (source / "dist").iterdir()
        made.append(wheel.read_bytes())
    assert made[0] == made[1]


def test_mypy_sees_the_types_of_an_installed_wheel(built: Path, tmp_path: Path) -> None:
    [wheel] = built.glob("*.whl")
    venv.create(tmp_path / "v", with_pip=False)
    interpreter = str(tmp_path / "v/bin/python")
    pip = [sys.executable, "-m", "pip", "--python", interpreter, "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    script = tmp_path / "script.py"
    script.write_text("import trainer_fsdp_patch\n\nreveal_type(trainer_fsdp_patch.patch()[0].effect)\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", interpreter, str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert 'Revealed type is "str"' in done.stdout or 'Revealed type is "builtins.str"' in done.stdout, done.stdout
    assert "Success" in done.stdout, done.stdout


def test_the_sdist_has_no_tests_that_lack_their_helpers(built: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert [name for name in names if name.startswith(("tests", "benchmarks", "docs"))] == []
    assert {"CHANGELOG.md", "LICENSE", "README.md", "setup.cfg"} <= set(names)


def test_the_sdist_holds_every_patch(built: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert (
        sorted(name.split("/")[-1] for name in names if name.split("/")[1:2] == ["patches"] and name.endswith(".py"))
        == PATCHES
    )


@pytest.mark.parametrize("how", ["wheel", pytest.param("editable", marks=pytest.mark.long), "editable-strict"])
def test_installed(built: Path, tmp_path: Path, how: str) -> None:
    venv.create(tmp_path / "v", with_pip=True, system_site_packages=False)
    interpreter = tmp_path / "v/bin/python"
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=IGNORED)
    [wheel] = built.glob("*.whl")
    what = {
        "wheel": [str(wheel)],
        "editable": ["-e", str(source)],
        "editable-strict": ["-e", str(source), "--config-settings", "editable_mode=strict"],
    }[how]
    subprocess.run([str(interpreter), "-m", "pip", "install", "-q", *what], check=True, capture_output=True)
    folders = [tmp_path] if how == "wheel" else [tmp_path, source]
    for folder in folders:
        printed = subprocess.run(
            [str(interpreter), "-c", IMPORT],
            cwd=folder, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""},
        ).stdout  # fmt: skip
        assert "accelerate_v0_30_backward" in printed
        assert ("site-packages" in printed) == (how == "wheel")


def test_without_the_targets(built: Path, tmp_path: Path) -> None:
    """The requirements force no torch: patch() skips everything, status says so, and check asks for what it lacks."""
    venv.create(tmp_path / "v", with_pip=True)
    [wheel] = built.glob("*.whl")
    subprocess.run([str(tmp_path / "v/bin/python"), "-m", "pip", "install", "-q", str(wheel)], check=True)
    command = [str(tmp_path / "v/bin/trainer-fsdp-patch")]
    environment = {**os.environ, "PYTHONPATH": ""}
    status = subprocess.run(
        [*command, "status", "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert status.returncode == 0, status.stderr
    found = json.loads(status.stdout)
    assert {patch["state"] for patch in found["patches"]} == {"skipped"}
    assert found["installed"]["torch"] == "absent"
    check = subprocess.run([*command, "check"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert check.returncode == 2
    assert check.stderr.startswith("check: torch and transformers and accelerate and peft not installed. ")


def test_straight_from_the_checkout(python: Callable[..., str]) -> None:
    assert "accelerate_v0_30_backward" in python(IMPORT)


def test_a_second_copy_of_the_patches_is_refused(python: Callable[..., str]) -> None:
    code = "try:\n    import patches\nexcept ImportError as error:\n    print(error)"
    assert python(code) == "import trainer_fsdp_patch.patches, not patches: a second copy would patch twice"


def test_setup_cfg_lists_what_is_on_disk() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    packages = config["options"]["packages"].split()
    package = ROOT / "trainer_fsdp_patch"
    rooms = [path.parent.name for path in package.glob("*/__init__.py")]
    assert packages == ["trainer_fsdp_patch", *sorted(f"trainer_fsdp_patch.{name}" for name in (*rooms, "patches"))]
    assert not [path for path in (ROOT / "patches").iterdir() if path.is_dir() and path.name != "__pycache__"]
    modules = {path.stem for path in (ROOT / "patches").glob("*.py")} - {"__init__"}
    assert {path.stem.removeprefix("test_") for path in (ROOT / "tests/patches").glob("test_*.py")} == modules
