"""One case of a training run: how it is trained, what it gives, and its comparison with one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trainer_fsdp_patch.measuring.footprint import Footprint
from trainer_fsdp_patch.testing import beyond

if TYPE_CHECKING:
    import torch

TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
"""Largest relative error of an update, by the lowest precision that takes part in the forward."""


@dataclass(frozen=True)
class Setup:
    """How a case is trained.

    Attributes:
        name: for tables.
        fsdp: version of FSDP; 0 is DDP.
        dtype: of the base model; amp: mixed precision, "no", "bf16" or "fp16".
        storage: "" for an unquantized base, "8bit", or the quant_storage of a 4-bit one by bitsandbytes.
        kind: of the latter, "nf4" or "fp4", with "double" for quantized constants.
        placement, budget: adapter_placement and base_budget of `patch()`; "" is none of the latter.
        quantizer: another one than bitsandbytes, for the tests' own loader.
        attention: implementation of the base's attention; compiled: backend of torch.compile, or "".
        use_orig_params, activation_checkpointing, ram_efficient: of FSDP; offload: of its shards to main memory.
        sharded_checkpoint: whether checkpoints are SHARDED_STATE_DICT.
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
    sharded_checkpoint: bool = False
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
    budget: str = ""
    offload: bool = False
    compiled: str = ""
    attention: str = "eager"

    @property
    def tolerance(self) -> float:
        low = not {"bfloat16", "float16"}.isdisjoint((self.dtype, self.storage)) or self.amp != "no"
        return TOLERANCE["bfloat16" if low else "float32"]


@dataclass
class Outcome:
    """What a run gave: an error in one line, or its numbers and the folder of its saved adapter.

    `footprint` is what FSDP took of rank 0 in the steps, also where the run failed after them. `planned` is what the
    plan said of it. `logs` has the end of what each rank of the launch wrote.
    """

    error: str = ""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    steps: list[dict[str, torch.Tensor]] = field(default_factory=list)
    folder: str = ""
    collectives: list[int] = field(default_factory=list)
    footprint: Footprint | None = None
    planned: Footprint | None = None
    extra: dict[str, object] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list, compare=False)


@dataclass(frozen=True)
class Verdict:
    """Comparison of a run with one process: `error` is "" where it is right."""

    error: str
    worst: float

    @property
    def right(self) -> bool:
        return not self.error


def merged(ranks: Sequence[Outcome]) -> Outcome:
    """The run of all ranks: that of the first, with losses averaged; or one that failed, and not by waiting for others.

    Args:
        ranks: what each gave.
    """
    failed = [outcome for outcome in ranks if outcome.error]
    if failed:
        return next((outcome for outcome in failed if "hung" not in outcome.error), failed[0])
    losses = [sum(step) / len(ranks) for step in zip(*(outcome.losses for outcome in ranks), strict=True)]
    return replace(ranks[0], losses=losses)


def compare(case: Outcome, reference: Outcome, setup: Setup) -> Verdict:
    """Whether a run trained and saved what one process did, and took no more than its plan says.

    The error of a tensor is the norm of the difference of the results over that of the reference's update. It is taken
    of the saved file and, where the run holds full tensors, after each step. That of losses and gradient norms is
    relative. Frozen tensors have to have the same bits.

    Args:
        case: the run on ranks.
        reference: the run in one process.
        setup: how both were trained; it sets the tolerance.
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
    # Negated, for NaN is below nothing.
    if broken is None and not worst <= setup.tolerance:
        return Verdict(f"off by {worst:.1e} of the update", worst)
    taken = beyond.fault(case.footprint, case.planned, None) if case.footprint else ""
    return broken or Verdict(taken, worst)


def _alike(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(ours[key].shape == theirs[key].shape for key in ours)


def _error(key: str, before: torch.Tensor, wanted: torch.Tensor, ours: torch.Tensor) -> Verdict:
    if ours.shape != wanted.shape or ours.dtype != wanted.dtype:
        return Verdict(f"{key} is {ours.dtype} {list(ours.shape)}", float("nan"))
    if before.shape != wanted.shape:
        # A method that cuts its ranks saves other shapes than it began with.
        before = wanted.new_zeros(wanted.shape)
    update, difference = (float((wanted.double() - other.double()).norm()) for other in (before, ours))
    if update == 0:
        return Verdict(f"{key} is frozen and was changed" if difference else "", difference)
    # NaN is not equal to itself.
    return Verdict("", difference / update if difference == difference else float("inf"))
