"""`trainer_fsdp_patch run`: programs as they would run by themselves, patched, and every Python below them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import pages
import pytest
from conftest import ROOT
from faults import where

from trainer_fsdp_patch.commands import launching

RUN = [sys.executable, "-m", "trainer_fsdp_patch", "run"]
SAY = """
import json, os, sys
import trainer_fsdp_patch
from trainer_fsdp_patch.patching import awaiting
print(json.dumps({"argv": sys.argv, "path": sys.path[0], "armed": bool(awaiting._ARMED), "name": __name__}))
"""
"""Says how it was started, and whether `patch()` waits for an import."""


def start(words: list[str], folder: Path, **extra: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra.pop("env", {})}
    return subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False, **extra
    )


def said(words: list[str], folder: Path, **extra: Any) -> dict[str, Any]:
    done = start([*RUN, *words], folder, **extra)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """In a folder whose name has a space."""
    folder = tmp_path / "my project"
    folder.mkdir()
    (folder / "train me.py").write_text(SAY)
    return folder / "train me.py"


def test_a_script(script: Path) -> None:
    found = said([str(script), "--name", "a b", "--", "-m"], script.parent.parent)
    assert found == {
        "argv": [str(script), "--name", "a b", "--", "-m"],
        "path": str(script.parent),
        "armed": True,
        "name": "__main__",
    }


def test_a_module(script: Path) -> None:
    package = script.parent / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("from package.part import *")
    (package / "part.py").write_text(SAY)
    found = said(["-m", "package", "-m", "--help"], script.parent)
    assert found["argv"] == [str(package / "__main__.py"), "-m", "--help"]
    assert found["armed"]


def test_code(script: Path) -> None:
    found = said(["-c", SAY, "-m"], script.parent)
    assert (found["argv"], found["path"], found["armed"]) == (["-c", "-m"], "", True)


def test_a_python_that_finds_no_package_takes_the_one_that_runs_it(script: Path, tmp_path: Path) -> None:
    """As one of another environment does, or the same one next to a checkout; its path stays as it is."""
    venv.create(tmp_path / "bare", with_pip=False)
    script.write_text(f"import sys\nassert {str(ROOT)!r} not in sys.path\n{SAY}")
    done = start([str(tmp_path / "bare/bin/python"), str(script)], tmp_path, env={"PYTHONPATH": str(launching.SITE)})
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["armed"]


def test_a_program_and_the_pythons_that_it_starts(script: Path) -> None:
    found = said(["bash", "-c", f'exec "{sys.executable}" "{script.name}" "$0"', "x"], script.parent)
    assert found["argv"] == [script.name, "x"]
    assert found["armed"]


def test_processes_that_are_spawned(script: Path) -> None:
    script.write_text(
        f"import multiprocessing\ndef work():\n    {SAY.replace(chr(10), chr(10) + '    ')}\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=work)\n"
        "    child.start(); child.join(); raise SystemExit(child.exitcode)\n"
    )
    assert said([str(script)], script.parent)["armed"]


def test_a_python_that_reads_no_environment_is_as_it_was(script: Path) -> None:
    within = "import sys; print('trainer_fsdp_patch' in sys.modules)"
    script.write_text(
        f"import subprocess, sys\nfor option in ('-E', '-b'):\n"
        f"    subprocess.run([sys.executable, option, '-c', {within!r}])\n"
    )
    assert start([*RUN, str(script)], script.parent).stdout.split() == ["False", "True"]


def test_a_sitecustomize_that_was_there_is_run_too(script: Path) -> None:
    theirs = script.parent / "theirs"
    theirs.mkdir()
    (theirs / "sitecustomize.py").write_text("import builtins\nbuiltins.theirs = __name__\n")
    script.write_text(f"{SAY}\nimport sitecustomize\nprint(json.dumps([theirs, sitecustomize.__file__, sys.path]))\n")
    path = f"{theirs}{os.pathsep}{ROOT}"
    done = start([*RUN, str(script)], script.parent, env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["armed"]
    name, file, paths = second
    assert (name, file) == ("sitecustomize", str(theirs / "sitecustomize.py"))
    assert not any("commands" in entry for entry in paths)
    assert str(theirs) in paths


def test_what_goes_in_and_comes_out_is_the_programs_own(script: Path) -> None:
    script.write_text("import sys\nsys.stdout.write(sys.stdin.read().upper())\nsys.exit(7)\n")
    done = start([*RUN, str(script)], script.parent, input="words")
    assert (done.returncode, done.stdout, done.stderr) == (7, "WORDS", "")


def test_a_traceback_is_as_without(script: Path) -> None:
    script.write_text("def fails():\n    raise ValueError('no')\nfails()\n")
    plain = start([sys.executable, str(script)], script.parent)
    ours = start([*RUN, str(script)], script.parent)
    assert (ours.returncode, ours.stderr) == (plain.returncode, plain.stderr)


def test_options_of_python_hold(script: Path) -> None:
    script.write_text("import warnings\nwarnings.warn('stop')\n")
    words = [sys.executable, "-W", "error", *RUN[1:], str(script)]
    assert start(words, script.parent).stderr.splitlines()[-1] == "UserWarning: stop"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_program(script: Path, number: int) -> None:
    script.write_text(
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *given: sys.exit(40))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*RUN, str(script)], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        begun = time.monotonic()
        process.send_signal(number)
        assert process.wait(30) == 40
        assert time.monotonic() - begun < 30


def test_switched_off(script: Path) -> None:
    script.write_text("import trainer_fsdp_patch\nprint({state.state for state in trainer_fsdp_patch.patch()})\n")
    done = start([*RUN, "--disable", "all", str(script)], script.parent)
    assert done.stdout == "{'skipped'}\n", done.stderr


def test_a_budget_reaches_the_program(script: Path) -> None:
    script.write_text("import os\nprint(os.environ['TRAINER_FSDP_PATCH_BASE_BUDGET'])\n")
    assert start([*RUN, "--base-budget", "25%", str(script)], script.parent).stdout == "25%\n"


def test_a_python_without_this_package_goes_on(script: Path, tmp_path: Path) -> None:
    """Such as one of another environment, which a program starts."""
    bare = [sys.executable, "-s", "-c", "import sys; sys.path[:] = []; print('went on')"]
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "trainer_fsdp_patch.py").write_text("raise ImportError('not here')\n")
    done = start(bare, tmp_path, env={"PYTHONPATH": f"{launching.SITE}{os.pathsep}{tmp_path / 'hide'}"})
    assert (done.returncode, done.stdout) == (0, "went on\n")
    assert (
        done.stderr == f"trainer_fsdp_patch run: {sys.executable} was not patched, and goes on without it: not here\n"
    )


CPU = """
import transformers
from trainer_fsdp_patch.testing import cpu

class TrainingArguments(transformers.TrainingArguments):
    def __post_init__(self):
        super().__post_init__()
        cpu.bridge(self)
"""
"""What CPU ranks need around a script that GPUs run as it stands; `patch()` is not called."""


@where("transformers>=5.10.dev0", "torch>=2.6.dev0")
@pytest.mark.parametrize(
    "launcher",
    [
        [*RUN, "torchrun", "--nproc-per-node", "2"],
        pytest.param(
            [*RUN, "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
            marks=pytest.mark.long,
        ),
        pytest.param(["torchrun", "--nproc-per-node", "2", "-m", "trainer_fsdp_patch", "run"], marks=pytest.mark.long),
    ],
    ids=["run torchrun", "run accelerate launch", "torchrun -m"],
)
def test_ranks_are_patched_and_save_a_sound_adapter(launcher: list[str], tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    [script] = [item.text for item in pages.fences(text, "README.md") if "Vera" in item.text]
    script = script.replace("import trainer_fsdp_patch\n\ntrainer_fsdp_patch.patch()\n", "")
    script = script.replace(", Trainer, TrainingArguments", ", Trainer")
    assert "trainer_fsdp_patch" not in script
    script = script.replace("report_to=[],", "report_to=[], use_cpu=True, ddp_backend='gloo',")
    path = tmp_path / "script.py"
    path.write_text(CPU + script)
    tools = Path(sys.executable).parent
    words = [str(tools / word) if word == "torchrun" and launcher[0] == word else word for word in launcher]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    done = start([*words, str(path)], tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    verified = start([sys.executable, "-m", "trainer_fsdp_patch", "verify", str(tmp_path / "adapter")], tmp_path)
    assert verified.returncode == 0, verified.stdout
