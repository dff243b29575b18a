"""README's script, on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pages
from conftest import ROOT
from faults import where

CPU = """
import transformers
from trainer_fsdp_patch.testing import cpu

def arguments(*args, **kwargs):
    made = transformers.TrainingArguments(*args, use_cpu=True, ddp_backend="gloo", **kwargs)
    cpu.bridge(made)
    return made
"""
"""What CPU ranks need in front of a script that GPUs run as it stands."""


@where("transformers>=5.10.dev0", "torch>=2.6.dev0")
def test_the_script_trains_and_saves_a_sound_adapter(tmp_path: Path) -> None:
    [script] = [
        item.text for item in pages.fences((ROOT / "README.md").read_text(), "README.md") if "Vera" in item.text
    ]
    assert script.splitlines()[:3] == ["import trainer_fsdp_patch", "", "trainer_fsdp_patch.patch()"]
    path = tmp_path / "script.py"
    path.write_text(CPU + script.replace("= TrainingArguments(", "= arguments("))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(path)]
    ran = subprocess.run(
        launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    verify = [sys.executable, "-m", "trainer_fsdp_patch", "verify", str(tmp_path / "adapter")]
    verified = subprocess.run(verify, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert verified.returncode == 0, verified.stdout
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    words = [word for word in text.split() if any(letter.isalnum() for letter in word)]
    assert len(text.splitlines()) <= 125
    assert len(words) <= 740
