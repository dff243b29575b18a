"""One training run of a tiny model on forked ranks, and its comparison with one process.

`check` and the tests share it: the parent imports everything once and forks two ranks for each case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer_fsdp_patch.inspecting import footprint, inventory
from trainer_fsdp_patch.inspecting.footprint import Footprint
from trainer_fsdp_patch.planning import expecting
from trainer_fsdp_patch.planning.prepared import prepared_by
from trainer_fsdp_patch.testing import cpu, stack

TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
"""Largest relative error of an update, by the lowest precision that takes part in the forward."""


@dataclass(frozen=True)
class Setup:
    """How a case is trained.

    Attributes:
        name: for tables.
        fsdp: version of FSDP; 0 is DDP.
        dtype: of the base model; amp: mixed precision, "no" or "bf16".
        storage: "" for an unquantized base, "8bit", or the quant_storage of a 4-bit one by bitsandbytes.
        kind: of the latter, "nf4" or "fp4", with "double" for quantized constants.
        placement: adapter_placement of `patch()`.
        quantizer: another one than bitsandbytes, for the tests' own loader.
        use_orig_params, activation_checkpointing, ram_efficient: of FSDP.
        sharded: whether checkpoints are SHARDED_STATE_DICT.
        accumulation, checkpointing, clip, optim: of the Trainer; clip is max_grad_norm.
        save_steps: a resume checkpoint is written after so many steps; 0 is never.
        resume: resume checkpoint to start from, or "".
        micro: number of parts in which one process takes a batch, as ranks would.
        wrap: "" for units by class, "size" or "none".
        ranks: number of them; batch: rows of the global batch; hybrid: whether pairs of ranks hold the base each.
    """

    name: str
    fsdp: int = 2
    dtype: str = "float32"
    amp: str = "no"
    storage: str = ""
    use_orig_params: bool = True
    activation_checkpointing: bool = False
    ram_efficient: bool = False
    sharded: bool = False
    accumulation: int = 1
    checkpointing: bool = False
    clip: float = 1.0
    optim: str = "adamw_torch"
    save_steps: int = 0
    resume: str = ""
    micro: int = 1
    wrap: str = ""
    ranks: int = 2
    batch: int = 0
    hybrid: bool = False
    kind: str = "nf4"
    quantizer: str = ""
    placement: str = "auto"

    @property
    def tolerance(self) -> float:
        low = not {"bfloat16", "float16"}.isdisjoint((self.dtype, self.storage)) or self.amp == "bf16"
        return TOLERANCE["bfloat16" if low else "float32"]


@dataclass
class Outcome:
    """What a run gave: an error in one line, or its numbers and the folder of its saved adapter.

    `footprint` is what FSDP took of rank 0 in the steps, also where the run failed after them, and `planned` what the
    plan said of it.
    """

    error: str = ""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    folder: str = ""
    collectives: list[int] = field(default_factory=list)
    footprint: Footprint | None = None
    planned: Footprint | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Comparison of a run with one process: `error` is "" where it is right."""

    error: str
    worst: float

    @property
    def right(self) -> bool:
        return not self.error


STEPS, BATCH, LENGTH, VOCABULARY = 3, 4, 12, 96
TIMEOUT = 60.0
"""Seconds after which ranks that wait for each other are killed."""


def tiny_base(folder: Path) -> str:
    """Write the base model of all cases: a random Llama of two layers, width 64, fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def load_base(folder: str, setup: Setup, kind: Any = None, quantization: Any = None) -> Any:
    """Load the base as a user would, quantized where the setup says so.

    Args:
        folder: of the base.
        setup: the case.
        kind: class of the model; None is AutoModelForCausalLM.
        quantization: a configuration of another quantizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if setup.storage:
        cpu.allow_packed_weights()
    if setup.storage == "8bit":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    elif setup.storage:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=setup.kind[:3],
            bnb_4bit_use_double_quant="double" in setup.kind,
            bnb_4bit_compute_dtype=torch.bfloat16 if setup.amp == "bf16" else getattr(torch, setup.dtype),
            bnb_4bit_quant_storage=getattr(torch, setup.storage),
        )
    model = (kind or AutoModelForCausalLM).from_pretrained(
        folder,
        quantization_config=quantization,
        attn_implementation="eager",
        **{stack.dtype_argument(): getattr(torch, setup.dtype)},
    )
    # FSDP's checkpointing recomputes layers, which would fill a cache twice.
    model.config.use_cache = False
    return model


def nudge(model: Any) -> None:
    """Move every trainable tensor off its initial value, the same on all ranks, so that all have gradients."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data.add_(noise.to(parameter))


def dataset(size: int, *, even: bool = False) -> list[dict[str, Any]]:
    """Random token sequences; the number of labelled tokens differs where the release accounts for that.

    Args:
        size: number of rows.
        even: whether all rows have the same number of labelled tokens.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(size):
        ids = torch.randint(0, VOCABULARY, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: index % 5 if stack.normalises_over_ranks() and not even else 1] = -100
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


def arguments(setup: Setup, folder: str, ranks: int) -> Any:
    """TrainingArguments of a case; one process gets the whole global batch."""
    import torch
    from transformers import TrainingArguments

    distributed = stack.fsdp(setup) if ranks > 1 and setup.fsdp else {}
    checkpointing = setup.checkpointing or (setup.activation_checkpointing and not distributed)
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=(setup.batch or BATCH) // ranks // setup.micro,
        gradient_accumulation_steps=setup.accumulation * setup.micro,
        max_steps=STEPS,
        learning_rate=1e-2,
        # With the default, Adam steps by the sign of the gradient: a wrong scale would not show, and where
        # the gradient is nearly zero bf16 noise would decide the step.
        adam_epsilon=1e-2,
        optim=setup.optim,
        max_grad_norm=setup.clip,
        bf16=setup.amp == "bf16",
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if setup.save_steps else "no",
        save_steps=setup.save_steps or STEPS,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend=None if ranks == 1 or torch.cuda.is_available() else "gloo",
        seed=0,
        **stack.tokens(),
        **distributed,
        **(stack.replicas(setup) if distributed else {}),
    )


def enter(setup: Setup, folder: str, ranks: int, *, patched: bool) -> Any:
    """Make this process one of the ranks of a case, patched or stock, and return its TrainingArguments."""
    import torch

    import trainer_fsdp_patch

    torch.set_num_threads(1)
    if patched:
        trainer_fsdp_patch.patch(strict=True, adapter_placement=setup.placement)
    stack.environment()
    given = arguments(setup, folder, ranks)
    if ranks > 1 and setup.fsdp and given.device.type == "cpu":
        cpu.bridge(given)
    return given


def train(
    setup: Setup, configure: Callable[[Any], Any], base: str, folder: str, ranks: int, patched: bool, rank: int
) -> Outcome:
    """Train and save one case in this process.

    Args:
        setup: the case.
        configure: takes the base model, returns the PEFT model. Where it has them, these attributes are heeded: `load`
            and `dataset` in place of this module's, `rows` (columns that the data has beside the model's), `even`
            (its loss ignores the Trainer's count of tokens), `micro` (its forward mixes the rows of a batch, so that
            one process takes a batch in two parts), `callbacks` (makes those of its schedule) and `save` (writes what
            peft cannot save from the model's state dict, which is gathered, into a folder).
        base: folder of the base model.
        folder: where the adapter is written.
        ranks: number of processes.
        patched: whether to call `patch()` first.
        rank: of this process; what a rank does depends on its environment alone.
    """
    import torch
    import transformers

    if getattr(configure, "micro", False) and ranks == 1:
        setup = dataclasses.replace(setup, micro=2)
    given = enter(setup, folder, ranks, patched=patched)
    given.remove_unused_columns = not getattr(configure, "rows", {})
    if getattr(configure, "even", False) and not setup.fsdp:
        # DDP is left to upstream, which multiplies such a loss by the number of ranks.
        given.average_tokens_across_devices = False
    torch.manual_seed(0)
    model = configure(getattr(configure, "load", load_base)(base, setup))
    nudge(model)
    recorder = _recorder(inventory.take(model))
    trainer = recorder.trainer(
        model=model,
        args=given,
        train_dataset=getattr(configure, "dataset", dataset)(STEPS * (setup.batch or BATCH) * setup.accumulation),
        callbacks=[*getattr(configure, "callbacks", list)(), recorder],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    save = getattr(configure, "save", None)
    if ranks == 1:
        _save(trainer, save, f"{folder}/init")
    outcome: Outcome = recorder.outcome
    try:
        trainer.train(resume_from_checkpoint=setup.resume or None)
        outcome.planned = _planned(trainer, outcome.footprint)
        with recorder.count() as counted:
            _save(trainer, save, folder)
    except Exception as error:
        return _failed(error, outcome)
    outcome.extra["saved_collectives"] = counted.total
    outcome.folder = folder
    outcome.norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return outcome


def _planned(trainer: Any, seen: Footprint | None) -> Footprint | None:
    """What the plan of a patched run says that it takes of a rank."""
    prepared = prepared_by(trainer)
    if prepared is None or seen is None:
        return None
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    # FSDP2 has nothing of that name, and gathers ahead in any case.
    prefetched = getattr(plugin, "backward_prefetch", None) is not None
    return expecting.footprint(prepared.plan, seen.ranks, prefetched=prefetched)


def _failed(error: BaseException, outcome: Outcome) -> Outcome:
    """The error in one line, beside what the run did before it."""
    first = (str(error).strip() or "no text").splitlines()[0]
    extra = {**outcome.extra, "traceback": "".join(traceback.format_exception(error))}
    return Outcome(error=f"{type(error).__name__}: {first}", footprint=outcome.footprint, extra=extra)


def _save(trainer: Any, save: Any, folder: str) -> None:
    if save is None:
        trainer.save_model(folder)
        return
    found = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.is_world_process_zero():
        save(found, folder)


def counter() -> Any:
    """A context manager class that counts the collectives dispatched inside it, in `total`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        total = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.total += function.namespace in ("c10d", "_c10d_functional") and "wait" not in str(function)
            return function(*args, **(kwargs or {}))

    return Count


def _recorder(tensors: list[inventory.Tensor]) -> Any:
    """A callback that keeps what is compared: losses, collectives, footprint and the adapter of each step.

    Args:
        tensors: of the model before it is wrapped.
    """
    import torch
    from transformers import Trainer, TrainerCallback

    from trainer_fsdp_patch.names import canonical

    class Recorder(TrainerCallback):  # type: ignore[misc]
        trainer: Any
        mode: Any
        watch: footprint.Watch
        watching: contextlib.ExitStack
        count = counter()

        def __init__(self) -> None:
            self.outcome = Outcome()
            self.running = 0.0

        def snapshot(self, model: Any) -> None:
            self.outcome.steps.append(
                {
                    canonical(name): parameter.detach().clone()
                    for name, parameter in model.named_parameters()
                    if parameter.requires_grad and type(parameter) is torch.nn.Parameter
                }
            )

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            self.snapshot(model)

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            self.mode, self.watch = self.count(), footprint.Watch(model, tensors)
            self.watching = contextlib.ExitStack()
            self.watching.enter_context(self.watch.watching())
            self.watching.enter_context(self.mode)

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            self.watching.close()
            self.outcome.collectives.append(self.mode.total)
            self.outcome.footprint = self.watch.footprint(self.mode.total, self.outcome.footprint)
            self.outcome.losses.append(self.running)
            self.running = 0.0
            self.snapshot(model)

    recorder = Recorder()

    class RecordingTrainer(Trainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            recorder.running += float(loss)
            return loss

    recorder.trainer = RecordingTrainer
    return recorder


def launch(function: Callable[..., Outcome], *args: Any, ranks: int) -> list[Outcome]:
    """Fork `ranks` processes, run a function in each, and collect what they return.

    Args:
        function: called as `function(*args, rank)` with the environment of a launcher set.
        *args: for the function; nothing is pickled.
        ranks: number of processes; one alone gets no distributed environment.

    Returns:
        One outcome for each rank; a rank that died or hung has an error.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        children = [
            context.Process(target=_child, args=(function, args, rank, ranks, port, f"{folder}/{rank}"))
            for rank in range(ranks)
        ]
        # What is here before the fork is nobody's garbage, and collections in the ranks need not walk all of torch.
        gc.freeze()
        for child in children:
            child.start()
        gc.unfreeze()
        _wait(children)
        return [_read(Path(f"{folder}/{rank}"), child.exitcode) for rank, child in enumerate(children)]


def _wait(children: list[Any]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while any(child.is_alive() for child in children):
        if any(child.exitcode not in (None, 0) for child in children):
            deadline = min(deadline, time.monotonic() + 3)
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.02)
    for child in children:
        child.join()


def _read(path: Path, code: int | None) -> Outcome:
    if not path.exists() and code == -signal.SIGKILL:
        return Outcome(error="hung: it waited for another rank until it was killed")
    if not path.exists():
        return Outcome(error=f"ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with {code}")
    outcome: Outcome = pickle.loads(path.read_bytes())
    return outcome


def _visible(ranks: int) -> str:
    """GPUs for one process or for all ranks: none where there are fewer than two, or fewer than ranks."""
    import torch

    count = torch.cuda.device_count()
    if count < max(2, ranks):
        return ""
    return ",".join(os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:ranks])


def _child(
    function: Callable[..., Outcome], args: tuple[Any, ...], rank: int, ranks: int, port: int, path: str
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = _visible(ranks)
    if ranks > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_BYPASS_DEVICE_MAP="true",
        )  # fmt: skip
    log = os.open(f"{path}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    warnings.simplefilter("ignore")
    try:
        outcome = function(*args, rank)
    except BaseException as error:
        outcome = _failed(error, Outcome())
    # A rank that has failed ends with 1, for others may wait for it.
    code = int(bool(outcome.error))
    Path(f"{path}.part").write_bytes(pickle.dumps(outcome))
    os.replace(f"{path}.part", path)
    os._exit(code)


def run(
    setup: Setup, configure: Callable[[Any], Any], base: str, folder: Path, *, ranks: int = 0, patched: bool = True
) -> Outcome:
    """Train one case on forked ranks, the set-up's where no number is given; losses are averaged over them."""
    ranks = ranks or setup.ranks
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = launch(train, setup, configure, base, str(folder), ranks, patched, ranks=ranks)
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        return next((outcome for outcome in failed if "hung" not in outcome.error), failed[0])
    losses = [sum(step) / ranks for step in zip(*(outcome.losses for outcome in outcomes), strict=True)]
    return dataclasses.replace(outcomes[0], losses=losses)


def compare(case: Outcome, reference: Outcome, setup: Setup) -> Verdict:
    """Whether a run trained and saved what one process did, and took no more of a rank than its plan says.

    The error of a tensor is the norm of the difference of the two results over the norm of the
    reference's update, in the saved file and, where the run holds whole tensors, after each step. That
    of losses and gradient norms is relative. Frozen tensors have to have the same bits.
    """
    from safetensors.torch import load_file

    if case.error:
        return Verdict(case.error, float("nan"))
    first, last = (load_file(f"{reference.folder}{part}/adapter_model.safetensors") for part in ("/init", ""))
    try:
        saved = load_file(f"{case.folder}/adapter_model.safetensors")
    except FileNotFoundError:
        return Verdict("no adapter file was written", float("nan"))
    missing = sorted(set(last) ^ set(saved))
    if missing:
        return Verdict(f"{len(missing)} of {len(last)} keys missing or foreign, such as {missing[0]}", float("nan"))
    pairs = [(first, last, saved)]
    # A resumed run has taken the last steps only.
    after = reference.steps[len(reference.steps) + 1 - len(case.steps) :] if case.steps else []
    if after and all(_alike(*step) for step in zip(case.steps[1:], after, strict=True)):
        pairs += [(reference.steps[0], *step) for step in zip(after, case.steps[1:], strict=True)]
    errors = [_error(key, *(tensors[key] for tensors in pair)) for pair in pairs for key in pair[1]]
    errors += [
        Verdict("", abs(value - wanted) / max(abs(wanted), 1e-12))
        for ours, theirs in ((case.losses, reference.losses), (case.norms, reference.norms))
        for value, wanted in zip(ours, theirs[-len(ours) :], strict=True)
    ]
    broken = next((verdict for verdict in errors if verdict.error), None)
    worst = max(errors, key=lambda verdict: verdict.worst).worst
    if broken is None and not worst <= setup.tolerance:
        return Verdict(f"off by {worst:.1e} of the update", worst)
    taken = footprint.fault(case.footprint, case.planned, None) if case.footprint else ""
    return broken or Verdict(taken, worst)


def _alike(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(ours[key].shape == theirs[key].shape for key in ours)


def _error(key: str, before: Any, wanted: Any, found: Any) -> Verdict:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return Verdict(f"{key} is {found.dtype} {list(found.shape)}", float("nan"))
    if before.shape != wanted.shape:
        # A method that cuts its ranks saves other shapes than it began with.
        before = wanted.new_zeros(wanted.shape)
    update, difference = (float((wanted.double() - other.double()).norm()) for other in (before, found))
    if update == 0:
        return Verdict(f"{key} is frozen and was changed" if difference else "", difference)
    return Verdict("", difference / update if difference == difference else float("inf"))
