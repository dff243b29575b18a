"""`accelerate launch` with the files that `accelerate config` itself writes, against one process."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from faults import where
from test_examples import EXAMPLES, SITE, differ, run

ANSWERS = """
import builtins, json, sys
from accelerate.commands.config import config_utils
from accelerate.commands import accelerate_cli

answers, asked = json.loads(sys.argv.pop(1)), []

def answer(question):
    # What nobody answers is what Enter gives.
    asked.append(question)
    return next((value for part, value in answers.items() if part in question), "")

class Menu:
    def __init__(self, question, options):
        self.question, self.options = question, options

    def run(self, default_choice=0):
        given = answer(self.question)
        return self.options.index(given) if given != "" else default_choice

builtins.input, config_utils.BulletMenu = answer, Menu
accelerate_cli.main()
unused = [part for part in answers if not any(part in question for question in asked)]
assert not unused, f"accelerate asks no such question: {unused}"
"""
"""Stands for the keyboard: `accelerate config` asks its own questions and writes its own file."""

COMMON = {
    "Which type of machine": "multi-GPU",
    "FullyShardedDataParallel": "yes",
    "`_no_split_modules`": "yes",
    "How many GPU(s)": "2",
}
FLAVOURS = {
    1: {**COMMON, "FSDP version": 1, "sharding strategy": "FULL_SHARD", "CPU RAM efficient": "no"},
    2: {**COMMON, "FSDP version": 2, "state dict type": "FULL_STATE_DICT"},
}


@where("transformers>=5.10.dev0", "torch>=2.6.dev0", "accelerate>=1.15.dev0")
@pytest.mark.parametrize("fsdp", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_file_that_accelerate_config_writes(tmp_path: Path, fsdp: int) -> None:
    import json

    answers = dict(FLAVOURS[fsdp])
    if fsdp == 1:
        # gloo's CPU ranks lack the collective that broadcasts on an accelerator.
        answers["broadcast module parameters"] = "no"
    else:
        answers["CPU RAM efficient"] = "no"
    file = tmp_path / "fsdp.yaml"
    run([sys.executable, "-c", ANSWERS, json.dumps(answers), "config", "--config_file", str(file)], tmp_path)
    written = yaml.safe_load(file.read_text())
    assert written["distributed_type"] == "FSDP"
    assert written["num_processes"] == 2
    assert written["fsdp_config"]["fsdp_version"] == fsdp
    assert written["fsdp_config"]["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert ("fsdp_use_orig_params" in written["fsdp_config"]) == (fsdp == 1)
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    project = EXAMPLES / "existing_project"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    # One process with the global batch of the two.
    alone = (project / "train.py").read_text().replace("max_steps=4", "max_steps=4, per_device_train_batch_size=16")
    (tmp_path / "one" / "train.py").write_text(alone)
    shutil.copy(project / "model.py", tmp_path / "one")
    run([sys.executable, "train.py"], tmp_path / "one", site)
    port = str(29500 + os.getpid() % 90)
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", port]
    run([*launch, "--config_file", str(file), str(project / "train.py")], tmp_path / "two", site)
    assert differ(tmp_path / "two" / "adapter", tmp_path / "one" / "adapter") < 1e-3


def test_the_examples_file_has_fields_that_accelerate_config_knows() -> None:
    """Each of its fields is one that accelerate's own questionnaire writes."""
    import inspect

    from accelerate.commands.config import cluster

    source = inspect.getsource(cluster)
    fields = yaml.safe_load((ROOT / "examples" / "existing_project" / "fsdp.yaml").read_text())["fsdp_config"]
    assert [name for name in fields if f'fsdp_config["{name}"]' not in source] == []
