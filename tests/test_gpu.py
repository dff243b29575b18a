"""`nox -s gpu` on what is here: accelerators where there are any, and the same lines on CPU ranks."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import gpu
import pytest
from cells import Bench, reference_of
from conftest import ROOT

from trainer_fsdp_patch import devices
from trainer_fsdp_patch.checking.setups import METHODS
from trainer_fsdp_patch.testing import trial
from trainer_fsdp_patch.testing.case import Outcome, Setup, compare, merged

accelerator = pytest.mark.skipif(devices.kind() == "cpu", reason="needs an accelerator")


def program(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tests/programs/gpu.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.gpu
@accelerator
def test_every_scenario_on_the_accelerators_that_are_here(tmp_path: Path) -> None:
    finished = program("--json", str(tmp_path / "gpu.json"))
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.gpu
@pytest.mark.skipif(devices.count() < 2, reason="needs two accelerators")
def test_check_on_accelerators() -> None:
    command = [sys.executable, "-m", "trainer_fsdp_patch", "check"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def on_cpu(tmp_path: Path, only: str, *words: str) -> dict[str, object]:
    """Run scenarios on CPU ranks; the result of the one that ran."""
    path = tmp_path / "gpu.json"
    finished = program("--device", "cpu", "--only", only, "--json", str(path), *words)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = json.loads(path.read_text())
    assert f"{len(found['rows'])} of {len(found['rows'])} right, 0 skipped" in finished.stdout
    return found


def test_a_scenario_on_one_cpu_rank(tmp_path: Path) -> None:
    found = on_cpu(tmp_path, "LoRA CPU offload, FSDP2")
    [row] = found["rows"]
    assert (found["ranks"], found["found"]["backend"]) == (1, "gloo")
    assert row["patched"]["wrong"] == ""
    assert row["patched"]["seconds"] > 0
    assert row["patched"]["rest"] > 0
    assert found["found"]["packages"]["torch"]


@pytest.mark.long
@pytest.mark.parametrize("only", ["VeRA bf16", "QLoRA", "QVeRA", "LoRA torch.compile"])
def test_more_scenarios_on_two_cpu_ranks(tmp_path: Path, only: str) -> None:
    assert len(on_cpu(tmp_path, only, "--ranks", "2")["rows"]) == 2


@pytest.mark.skipif(devices.kind() != "cpu", reason="there is an accelerator")
def test_without_an_accelerator_one_line_says_so(tmp_path: Path) -> None:
    finished = program("--json", str(tmp_path / "gpu.json"))
    assert finished.returncode == 2
    [line] = [line for line in finished.stderr.splitlines() if line.startswith("tests/programs/gpu.py: ")]
    assert "sees no accelerator that can train ranks. Nothing was run. Run it where" in line


@pytest.mark.parametrize("words", [["--only", "nothing"], ["--ranks", "-1"]])
def test_a_wrong_word_ends_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.arguments(words)
    assert ended.value.code == 2


def test_what_a_device_says_of_itself() -> None:
    """AMD's and Intel's properties lack what NVIDIA's have."""
    nvidia = namedtuple("nvidia", "total_memory major minor")(2**30, 9, 0)
    intel = namedtuple("intel", "total_memory")(2**29)
    for properties, capability in ((nvidia, "9.0"), (intel, "")):
        module = SimpleNamespace(
            get_device_properties=lambda index, found=properties: found, get_device_name=lambda index: f"card {index}"
        )
        assert devices.described(module, 1) == ("card 1", properties.total_memory, capability)


def test_whether_the_runtime_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, begun in (("cpu", True), ("xpu", True), ("xpu", False)):
        monkeypatch.setattr(devices, "current", lambda kind=kind: SimpleNamespace(type=kind))
        monkeypatch.setattr(devices, "module", lambda kind, begun=begun: SimpleNamespace(is_initialized=lambda: begun))
        assert devices.has_begun() == (kind != "cpu" and begun)


def test_ranks_of_check_train_where_its_imports_have_begun_the_runtime(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of bitsandbytes and torchao do on CUDA: no fork could use a device, so ranks are started afresh."""
    setup, method = Setup("fresh"), METHODS["vera"]
    one = trial.run(reference_of(setup), method, bench.base, tmp_path / "one", ranks=1, patched=False)
    monkeypatch.setattr(devices, "has_begun", lambda: True)
    upstream, started = multiprocessing.get_context, []
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: started.append(method) or upstream(method))
    outcome = trial.run(setup, method, bench.base, tmp_path / "ranks")
    assert outcome.error == "", outcome.extra
    assert compare(outcome, one, setup).error == ""
    assert started == ["spawn"]


def test_what_begins_late_is_skipped_and_says_why() -> None:
    session = gpu.Session.__new__(gpu.Session)
    session.found, session.clock = {"kind": "cpu", "fsdp": [1, 2], "packages": {}}, gpu.Clock(late=0)
    scenario, fsdp = next(iter(gpu.chosen("VeRA, FSDP2")))
    row = session.row(scenario, fsdp)
    assert row == {"scenario": "VeRA", "fsdp": 2, "skipped": "time"}
    assert gpu.cells(row)[2] == "skipped: time"
    assert not gpu.right(row)


def test_a_step_that_the_scaler_skips_has_to_be_skipped_by_one_process_too() -> None:
    inf, one = float("inf"), Outcome(losses=[1.0, 1.0], norms=[1.0, 1.0])
    ranks = [Outcome(losses=[1.0, 1.0], norms=[inf, 1.0])]
    assert gpu.judged(merged(ranks), one, Setup("fp16")).error == "it skipped other steps than one process"
    failed = merged([Outcome(error="hung"), Outcome(error="OSError: x")])
    assert gpu.judged(failed, one, Setup("fp16")).error == "OSError: x"
