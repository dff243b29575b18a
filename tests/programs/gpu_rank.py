"""A rank of `tests/programs/gpu.py`: imports, waits for one line of JSON, does what it says, and pickles an Outcome."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import gpu_scenarios
import torch
import transformers
from accelerate.utils.environment import check_cuda_p2p_ib_support
from gpu_scenarios import COMPARED, SCENARIOS, Size
from torch._dynamo.utils import counters

from trainer_fsdp_patch import devices, versions
from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.measuring import footprint
from trainer_fsdp_patch.testing import forks, recording, releases, targets, trial
from trainer_fsdp_patch.testing.case import Outcome, Setup

PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "flash_attn", "triton", "trainer_fsdp_patch")


class Meter:
    """Clock and memory of a device; a CPU has no count of its own.

    Args:
        module: torch's for the kind of device.
    """

    def __init__(self, module: Any) -> None:
        self.module, self.counts = module, hasattr(module, "max_memory_allocated")

    def reset(self) -> None:
        """Begin to look for the peak anew."""
        if self.counts:
            self.module.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """The most bytes that tensors have taken at once since then."""
        return int(self.module.max_memory_allocated()) if self.counts else None

    def held(self) -> int | None:
        """Bytes that tensors take now."""
        return int(self.module.memory_allocated()) if self.counts else None

    def now(self) -> float:
        """Seconds, once all that was begun on the device has ended."""
        self.module.synchronize()
        return time.perf_counter()


def runtimes() -> dict[str, str]:
    """Releases of what torch was built for, of its collectives and of the driver, as far as they can be known."""
    found = {name: getattr(torch.version, name, None) for name in ("cuda", "hip", "xpu")}
    with contextlib.suppress(Exception):
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if devices.kind() == "cuda" else None
    found["driver"] = driver()
    return {name: str(value) for name, value in found.items() if value}


def driver() -> str:
    """Release of the accelerator's driver, or ""."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]):
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        if said.returncode == 0 and said.stdout.strip():
            return said.stdout.split()[0]
    for module in ("amdgpu", "xe", "i915"):
        with contextlib.suppress(OSError):
            return f"{module} {Path(f'/sys/module/{module}/version').read_text().strip()}"
    return ""


def probe() -> dict[str, Any]:
    """What is here: devices, releases, and whether torch can compute on the first device."""
    kind = devices.kind()
    described = [devices.described(devices.module(kind), index)._asdict() for index in range(devices.count())]
    # A device that is seen may be of no use: an old driver, a card that this torch has no kernels for.
    total = float((torch.ones(8, 8, device=kind) @ torch.ones(8, 8, device=kind)).sum())
    assert total == 512, f"the sum of a product of ones is {total} on {kind}, and not 512"
    return {
        "kind": kind,
        "backend": devices.backend(kind),
        "devices": described,
        "runtimes": runtimes(),
        "packages": {name: str(versions.installed(name) or "") for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "fsdp": [1, 2] if releases.has_fsdp2() else [1],
    }


def write_base(size: Size, folder: str) -> None:
    """Write the base of all scenarios, a random Llama in fp32."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**size.config())).save_pretrained(folder)


class Unpinned(transformers.TrainerCallback):  # type: ignore[misc]
    """Has FSDP2 offload to memory that is not pinned, which needs an accelerator."""

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        from accelerate.state import AcceleratorState
        from torch.distributed.fsdp import CPUOffloadPolicy

        AcceleratorState().fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)


class Recorder(transformers.TrainerCallback):  # type: ignore[misc]
    """Keeps what is compared of the first steps, and time and memory of those after them.

    Args:
        tensors: of the model before it is wrapped.
        folder: where the adapter is saved after the compared steps.
    """

    trainer: Any
    failure: Exception | None = None

    def __init__(self, tensors: list[inventory.TensorInfo], folder: str) -> None:
        self.tensors, self.folder, self.outcome = tensors, folder, Outcome()
        self.meter = Meter(devices.module(devices.kind()))
        self.running = self.began = 0.0
        self.seconds: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.outcome.steps.append(recording.trained(model))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.meter.now()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        seconds = self.meter.now() - self.began
        if state.global_step > COMPARED:
            self.seconds.append(seconds)
            return
        self.outcome.losses.append(self.running)
        self.running = 0.0
        self.outcome.steps.append(recording.trained(model))
        if state.global_step == COMPARED:
            self.outcome.footprint = footprint.Watch(model, self.tensors).footprint()
            self.outcome.extra |= {"peak_start": self.meter.peak(), "held": self.meter.held()}
            try:
                self.trainer.save_model(self.folder)
            except Exception as error:
                # The steps are right or wrong without it, and have their times.
                self.failure = error
            self.meter.reset()


def train(job: dict[str, Any]) -> Outcome:
    """Train one scenario in this process, as one of the ranks or alone."""
    scenario = next(item for item in SCENARIOS if item.name == job["scenario"])
    size: Size = getattr(gpu_scenarios, job["size"])
    alone, folder, ranks = job["side"] == "one", job["folder"], job["ranks"]
    trial.STEPS, trial.BATCH = COMPARED + size.timed, size.global_batch(ranks)
    trial.LENGTH, trial.VOCABULARY = size.length, size.vocabulary
    kind = devices.kind()
    setup = scenario.of(0 if alone else job["fsdp"], kind)
    given = trial.enter(setup, folder, 1 if alone else ranks, patched=job["side"] == "patched")
    if alone:
        # Not DataParallel over all devices that are there.
        given._n_gpu = min(given.n_gpu, 1)
    torch.manual_seed(0)
    model = scenario.configure(trial.load_base(job["base"], setup))
    trial.nudge(model)
    recorder = Recorder(inventory.take(model).tensors(), folder)
    callbacks = [recorder, *([Unpinned()] if setup.offload and kind == "cpu" else [])]
    recorder.trainer = trainer = recording.trainer_class(recorder)(
        model=model, args=given, train_dataset=trial.dataset(trial.STEPS * trial.BATCH), callbacks=callbacks
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if alone:
        trainer.save_model(f"{folder}/init")
    outcome = recorder.outcome
    try:
        trainer.train()
    except Exception as error:
        return forks.failed(error, outcome)
    outcome.extra |= {"seconds": recorder.seconds, "peak": recorder.meter.peak()}
    other = unlike(setup, trainer)
    if other:
        outcome.error = f"the run is not what its name says: {other}"
        return outcome
    if recorder.failure is not None:
        return forks.failed(recorder.failure, outcome)
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    outcome.norms, outcome.folder = [float(norm) for norm in norms[:COMPARED]], folder
    outcome.planned = trial.planned(trainer, outcome.footprint)
    return outcome


def unlike(setup: Setup, trainer: Any) -> str:
    """What a run did otherwise than its set-up says, or ""."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if setup.amp == "fp16" and trainer.accelerator.scaler is None:
        return "no gradient was scaled"
    if setup.attention != model.config._attn_implementation:
        return f"its attention was {model.config._attn_implementation}"
    if setup.compiled and not counters["stats"]["unique_graphs"]:
        return "nothing was compiled"
    if setup.storage and not any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        return "nothing was quantized"
    if setup.offload and not any(parameter.device.type == "cpu" for parameter in trainer.model.parameters()):
        return "nothing was kept in main memory"
    return ""


def do(job: dict[str, Any]) -> Outcome:
    """What a job asks for."""
    if job["what"] == "probe":
        return Outcome(extra=probe())
    if job["what"] == "base":
        write_base(getattr(gpu_scenarios, job["size"]), job["folder"])
        return Outcome()
    return train(job)


def end_with_parent() -> None:
    """The parent keeps the other end of the input open for as long as it lives."""
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    targets.import_all()
    line = sys.stdin.buffer.readline()
    if not line:
        return
    job = json.loads(line)
    os.environ.update(job["environment"])
    if not check_cuda_p2p_ib_support():
        # As `accelerate launch` does for consumer cards, with which accelerate stops otherwise.
        os.environ.update(NCCL_P2P_DISABLE="1", NCCL_IB_DISABLE="1")
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        outcome = do(job)
    except BaseException as error:
        outcome = forks.failed(error, Outcome())
    part = Path(f"{job['result']}.part")
    part.write_bytes(pickle.dumps(outcome))
    part.replace(job["result"])
    sys.stdout.flush()
    # Threads of the collectives may outlive Python's own end, and fail there.
    os._exit(int(bool(outcome.error)))


if __name__ == "__main__":
    main()
