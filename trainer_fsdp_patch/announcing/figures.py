"""Figures of a run in its Trainer's log, where a user asks for them."""

from __future__ import annotations

import functools
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch import devices
from trainer_fsdp_patch.errors import PlanError
from trainer_fsdp_patch.inspecting.inventory import ADAPTER, BASE, PROJECTION, QUANTIZED, dtensor, nbytes_of
from trainer_fsdp_patch.measuring.footprint import Footprint
from trainer_fsdp_patch.names import canonical
from trainer_fsdp_patch.planning import budget, expecting
from trainer_fsdp_patch.planning.plan import REPLICATE

if TYPE_CHECKING:
    import torch
    from transformers import Trainer, TrainerState

    from trainer_fsdp_patch.planning.plan import Plan
    from trainer_fsdp_patch.planning.prepared import Prepared

ENVIRONMENT = "TRAINER_FSDP_PATCH_LOG"
"""Environment variable: whether figures stand in the Trainer's log."""

PREFIX = "trainer_fsdp_patch/"
_ANSWERS = {"": False, "0": False, "false": False, "no": False, "off": False} | dict.fromkeys(
    ("1", "true", "yes", "on"), True
)


def asked() -> bool:
    """Whether the environment asks for figures.

    Raises:
        PlanError: its answer is neither yes nor no.
    """
    given = os.environ.get(ENVIRONMENT, "")
    answer = _ANSWERS.get(given.strip().lower())
    if answer is None:
        raise PlanError(ENVIRONMENT, repr(given), "No plan was made", "Use 1 or 0", setting=ENVIRONMENT)
    return answer


def watch(trainer: Trainer, prepared: Prepared) -> None:
    """Have figures in the entries that this training logs; the callback goes when the training ends.

    Args:
        trainer: about to train.
        prepared: its model's record.

    Raises:
        PlanError: the environment's answer is neither yes nor no.
    """
    if not asked():
        return
    handler = trainer.callback_handler
    others = [item for item in handler.callbacks if not isinstance(item, _kind())]
    # Ahead of the reporters, which are handed the same entry. A new list: upstream may be walking the old one.
    handler.callbacks = [_kind()(handler, of(prepared), trainer.accelerator.device), *others]


def taken(prepared: Prepared) -> Footprint:
    """What a rank takes between steps, as planned; of a base that transformers has sharded, as it did.

    Args:
        prepared: the model's record.
    """
    plan = prepared.plan
    if not prepared.native:
        return expecting.footprint(plan, plan.ranks)
    # Before its first forward FSDP knows nothing of what was loaded into its shards since.
    roles = {item.tensor.name: item.tensor.role for item in plan.placements}
    rest, ranks = Counter[tuple[bool, bool]](), 1
    for name, parameter in prepared.model().named_parameters():
        shard = isinstance(parameter, dtensor())
        ranks = parameter.device_mesh.size() if shard else ranks
        local = parameter.to_local() if shard else parameter
        rest[roles.get(canonical(name)) in (BASE, QUANTIZED), shard] += nbytes_of(local)
    base = rest[True, True] + rest[True, False]
    return Footprint(ranks, units=None, rest=rest.total(), base=base, replicated=rest[True, False], gathered=None)


def held(plan: Plan, taken: Footprint) -> int:
    """Bytes of parameters and buffers that a rank holds between steps, without gradients and optimizer states.

    Args:
        plan: of the model.
        taken: by a rank.
    """
    # VeRA's projections are buffers, and often most of what is full; a footprint has parameters alone.
    buffers = (item.tensor.nbytes for item in plan.placements if item.tensor.kind == "buffer")
    return taken.rest + sum(buffers)


def of(prepared: Prepared) -> dict[str, int]:
    """What stays the same during a run; bytes are those that one rank holds between steps.

    Args:
        prepared: the model's record.
    """
    plan, footprint = prepared.plan, taken(prepared)
    figures = {
        "held_bytes": held(plan, footprint),
        "base_bytes": footprint.base,
        "replicated_base_bytes": footprint.replicated,
        "replicated_adapter_bytes": sum(plan.nbytes(REPLICATE, role) for role in (ADAPTER, PROJECTION)),
        "resident_units": len(plan.resident),
    }
    if plan.traffic is not None and plan.ranks > 1:
        figures["gathers_per_micro_batch"], figures["gathered_bytes_per_micro_batch"] = plan.traffic
    return figures


def peak(device: torch.device) -> dict[str, int]:
    """The most bytes that this process has had of its accelerator so far; nothing where none is counted.

    Args:
        device: that the rank trains on.
    """
    count = getattr(devices.module(device.type), "max_memory_allocated", None) if device.type != "cpu" else None
    return {} if count is None else {"peak_bytes": int(count(device))}


@functools.cache
def _kind() -> type[Any]:
    from transformers import TrainerCallback

    class Figures(TrainerCallback):  # type: ignore[misc]
        """Adds to entries of the training, and leaves those of evaluations alone."""

        def __init__(self, handler: Any, fixed: dict[str, int], device: torch.device) -> None:
            self.handler, self.fixed, self.device = handler, fixed, device
            # `unpatch()` puts others in their place.
            self.settings = budget.settings

        def on_log(self, args: object, state: TrainerState, control: object, logs: dict[str, Any], **_: object) -> None:
            training = "loss" in logs or "train_loss" in logs
            if not training or self.settings is not budget.settings:
                return
            figures = {PREFIX + name: value for name, value in {**self.fixed, **peak(self.device)}.items()}
            self.fixed = {}
            # The Trainer has put a copy of the entry into its history already; one that logs by itself may not.
            entry = state.log_history[-1] if state.log_history else {}
            if entry.items() >= logs.items():
                entry.update(figures)
            logs.update(figures)

        def on_train_end(self, *_: object, **__: object) -> None:
            self.handler.callbacks = [item for item in self.handler.callbacks if item is not self]

    return Figures
