"""Bytes of a rank by a plan: what it holds between steps, what comes with gradients and optimizer, and the peak."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch.errors import PlanError
from trainer_fsdp_patch.estimating.activations import Activations
from trainer_fsdp_patch.estimating.fakes import fake_tensors
from trainer_fsdp_patch.inspecting.inventory import ADAPTER, BASE, PROJECTION, QUANTIZED
from trainer_fsdp_patch.planning import expecting
from trainer_fsdp_patch.planning.plan import REPLICATE, SHARD, Plan

if TYPE_CHECKING:
    import torch

PARTS = ("base", "quantized", "projections", "adapter", "gradients", "optimizer", "gathered", "activations")
"""Of a rank's memory, in the order in which they are shown. Gradients and the last two are there during a step only."""

_ROLES = {"base": BASE, "quantized": QUANTIZED, "projections": PROJECTION, "adapter": ADAPTER}


@dataclass(frozen=True)
class Estimate:
    """What a run takes of each rank.

    Attributes:
        plan: of the model.
        parts: bytes by the names of `PARTS`; of activations it is the most that is alive at once.
        kept: bytes that autograd keeps at the end of the forward pass, or None where nobody knows.
        unknown: why the activations are not known, or "".
        checkpointing: whether layers are recomputed.
        rows: of a rank's micro-batch; length: tokens of a row.
    """

    plan: Plan
    parts: dict[str, int]
    kept: int | None
    unknown: str
    checkpointing: bool
    rows: int
    length: int

    @property
    def resting(self) -> int:
        """Bytes between steps, where gradients are gone."""
        return sum(size for name, size in self.parts.items() if name not in ("gradients", "gathered", "activations"))

    @property
    def peak(self) -> int:
        """The most bytes at once, as if all units were gathered when the activations are at their peak."""
        return sum(self.parts.values())


def estimate(
    plan: Plan,
    states: int,
    scales: int,
    kept: Activations | str,
    *,
    checkpointing: bool,
    rows: int,
    length: int,
    gathers: int = 2,
    prefetched: bool = False,
) -> Estimate:
    """Add up what a run takes of each rank.

    Args:
        plan: of the model.
        states: bytes of the optimizer's states, of `optimizer_bytes`.
        scales: bytes that quantized layers which are full on each rank keep next to their parameters.
        kept: bytes of the activations, or why they are not known.
        checkpointing: whether layers are recomputed.
        rows: of a rank's micro-batch.
        length: tokens of a row.
        gathers: how often a step gathers a layer.
        prefetched: whether FSDP1 gathers the next unit ahead.
    """
    parts = {name: _resting(plan, role) for name, role in _ROLES.items()}
    gathered = expecting.footprint(plan, plan.ranks, prefetched=prefetched, gathers=gathers).gathered
    parts["quantized"] += scales
    parts["gradients"] = parts["adapter"]
    parts["optimizer"] = states
    # Where units do not go by class, all of the base may be gathered at once.
    parts["gathered"] = plan.nbytes(SHARD) if gathered is None else gathered
    if plan.ranks == 1:
        parts["gathered"] = 0
    known = isinstance(kept, Activations)
    parts["activations"] = kept.peak if isinstance(kept, Activations) else 0
    first = kept.kept if isinstance(kept, Activations) else None
    return Estimate(plan, parts, first, "" if known else str(kept), checkpointing, rows, length)


def _resting(plan: Plan, role: str) -> int:
    """Bytes that a rank holds of one role: shards, replicas, and buffers, which are full on each."""
    held = tuple(item for item in plan.placements if item.tensor.role == role)
    buffers = sum(item.tensor.nbytes for item in held if item.tensor.kind == "buffer")
    alone = dataclasses.replace(plan, placements=held, units=None)
    return expecting.footprint(alone, plan.ranks).rest + buffers


def optimizer_bytes(plan: Plan, name: str) -> int:
    """Bytes of the states that an optimizer keeps on a rank, by one step of it on tensors without data.

    Args:
        plan: of the model.
        name: as TrainingArguments' `optim` has it, such as "adamw_torch".

    Raises:
        PlanError: it is unknown, or works with data only.
    """
    kind, settings = _optimizer(name)
    shapes: Counter[tuple[tuple[int, ...], str]] = Counter()
    for item in plan.placements:
        tensor = item.tensor
        if tensor.role == ADAPTER and tensor.kind == "parameter":
            full = item.placement == REPLICATE
            rows = tensor.shape[:1] if full else (-(-tensor.shape[0] // plan.ranks),)
            # accelerate keeps what it shards and trains in fp32 under mixed precision.
            dtype = tensor.dtype if full or plan.autocast is None else "float32"
            shapes[(*rows, *tensor.shape[1:]), dtype] += 1
    return sum(count * _states(kind, settings, *shape) for shape, count in shapes.items())


def _optimizer(name: str) -> tuple[Any, dict[str, Any]]:
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    # A TrainingArguments would set up devices and accelerate's state, for a run that nobody starts.
    values = {
        item.name: item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        for item in dataclasses.fields(TrainingArguments)
    }
    try:
        arguments: Any = SimpleNamespace(**values | {"optim": OptimizerNames(name)})
        found: tuple[Any, dict[str, Any]] = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ValueError, ImportError) as error:
        said = f"{name}: {' '.join(str(error).split()).partition('. ')[0].rstrip('.')}"
        raise PlanError("--optim", said, "No plan was made", "Use adamw_torch", setting="--optim") from None
    return found


def _states(kind: Any, settings: dict[str, Any], shape: tuple[int, ...], dtype: str) -> int:
    import torch

    with fake_tensors():
        made = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
        parameter = torch.nn.Parameter(made)
        parameter.grad = torch.empty_like(parameter)
        try:
            optimizer = kind([parameter], **settings)
            optimizer.step()
        except Exception as error:
            raise PlanError(
                "--optim",
                f"{kind.__name__} cannot be counted without data: {type(error).__name__}",
                "No plan was made",
                "Use adamw_torch",
                setting="--optim",
            ) from None
        held: list[torch.Tensor] = [item for item in optimizer.state[parameter].values() if torch.is_tensor(item)]
        return sum(item.numel() * item.element_size() for item in held)
