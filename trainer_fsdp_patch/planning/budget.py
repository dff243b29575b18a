"""Which trainable tensors are too big to be replicated: the rule, and what a user sets of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.errors import PlanError
from trainer_fsdp_patch.inspecting.inventory import ADAPTER, BASE, QUANTIZED, TensorInfo
from trainer_fsdp_patch.planning import residence
from trainer_fsdp_patch.sizes import size

PLACEMENTS = ("auto", "replicate", "shard")
FLOOR = 2**30
"""Bytes that a replicated adapter may cost each rank in any case."""

_STATE = 8
"""Bytes of optimizer state for each element: AdamW's two moments in fp32."""


@dataclass
class Settings:
    """What `patch()` was given.

    Attributes:
        adapter_placement: "auto" shards the largest trainable tensors until the others fit the budget. "replicate"
            shards none, "shard" all that can be.
        adapter_budget: bytes that each rank may hold of the replicated adapter: parameters, gradients and optimizer
            state. None is 1 GiB, or a rank's share of the sharded base where that is more.
        base_budget: what each rank may hold of the base beyond its shards; `residence` has the rule.
    """

    adapter_placement: str = "auto"
    adapter_budget: int | None = None
    base_budget: int | str | None = None


settings = Settings()


def set_to(adapter_placement: str | None, adapter_budget: int | None, base_budget: int | str | None = None) -> None:
    """Keep what a user sets; None leaves it as it is.

    Args:
        adapter_placement: one of `PLACEMENTS`.
        adapter_budget: bytes.
        base_budget: bytes, a text of them, a share, or "auto".

    Raises:
        PlanError: it is no placement, or no number of bytes.
    """
    check_settings(adapter_placement or "auto", adapter_budget)
    residence.check(base_budget)
    settings.adapter_placement = adapter_placement or settings.adapter_placement
    settings.adapter_budget = settings.adapter_budget if adapter_budget is None else adapter_budget
    settings.base_budget = settings.base_budget if base_budget is None else base_budget


def check_settings(adapter_placement: str, adapter_budget: int | None) -> None:
    """Refuse what is no setting.

    Args:
        adapter_placement: one of `PLACEMENTS`.
        adapter_budget: bytes, at least 0; None is the default.

    Raises:
        PlanError: it is no placement, or no number of bytes.
    """
    if adapter_placement not in PLACEMENTS:
        _refuse("adapter_placement", adapter_placement, f"Use one of {', '.join(map(repr, PLACEMENTS))}")
    number = isinstance(adapter_budget, int) and not isinstance(adapter_budget, bool) and adapter_budget >= 0
    if adapter_budget is not None and not number:
        _refuse("adapter_budget", adapter_budget, "Give a number of bytes, such as 2 * 2**30, or leave it out")


def _refuse(setting: str, value: object, remedy: str) -> None:
    raise PlanError(setting, repr(value), "No plan was made", remedy, setting=setting)


def cost(tensor: TensorInfo) -> int:
    """Bytes that a replicated trainable tensor costs each rank: itself, its gradient and its optimizer state."""
    return 2 * tensor.nbytes + _STATE * math.prod(tensor.shape)


def choose_sharded(
    tensors: list[TensorInfo], barred: dict[str, str], asked: Settings, ranks: int
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Trainable tensors that are sharded, with the reason, and a sentence for the log.

    Args:
        tensors: of the model.
        barred: those that cannot be sharded, by name, and why.
        asked: the user's settings.
        ranks: over which FSDP shards.

    Returns:
        Reasons by canonical name, and sentences.
    """
    trained = [tensor for tensor in tensors if tensor.role == ADAPTER]
    share = sum(item.nbytes for item in tensors if item.role in (BASE, QUANTIZED) and item.kind == "parameter") // ranks
    budget = max(FLOOR, share) if asked.adapter_budget is None else asked.adapter_budget
    total = sum(map(cost, trained))
    chosen: dict[str, str] = {}
    if asked.adapter_placement == "replicate" or (asked.adapter_placement == "auto" and total <= budget):
        return chosen, ()
    left = total
    for tensor in sorted((item for item in trained if item.name not in barred), key=cost, reverse=True):
        if asked.adapter_placement == "auto" and left <= budget:
            break
        left -= cost(tensor)
        chosen[tensor.name] = f"trainable: sharded, for replicas would cost each rank {size(cost(tensor))}"
    kept = [tensor for tensor in trained if tensor.name not in chosen]
    why = next((f", such as {item.name}: {barred[item.name]}" for item in kept if item.name in barred), "")
    rest = f"the others cost each rank {size(left)}"
    text = f"{len(chosen)} of {len(trained)} trainable tensors are sharded, {rest}"
    return chosen, (text + why,)


def cannot_shard(
    tensors: list[TensorInfo], fsdp_version: int, units: dict[str, set[str]], copies: set[str]
) -> dict[str, str]:
    """Trainable tensors that FSDP cannot shard, by name, and why.

    Args:
        tensors: of the model.
        fsdp_version: 1 or 2.
        units: names of the FSDP units that each parameter is used in, by its name.
        copies: names of the parameters of full modules that are trained, as modules_to_save has them.
    """
    barred = {}
    # The largest tensor of a unit comes first and sets the dtype of that unit: `setdefault` keeps the first one.
    # The order of the conditions matters. A tensor that is barred for another reason sets no dtype.
    dtypes: dict[str, str] = {}
    for tensor in sorted((item for item in tensors if item.role == ADAPTER), key=cost, reverse=True):
        unit = min(units[tensor.name])
        if len(units[tensor.name]) > 1:
            barred[tensor.name] = f"{len(units[tensor.name])} units share it"
        elif fsdp_version == 1 and tensor.name not in copies:
            barred[tensor.name] = "FSDP1 would give its unit's frozen weights a gradient"
        elif fsdp_version == 2 and not _side_by_side():
            barred[tensor.name] = "that takes accelerate 1.15 and torch 2.13"
        elif dtypes.setdefault(unit, tensor.dtype) != tensor.dtype:
            barred[tensor.name] = f"its unit trains {dtypes[unit]} and not {tensor.dtype}"
    return barred


def _side_by_side() -> bool:
    """Whether accelerate clips sharded and full gradients together, and torch takes a unit of two dtypes."""
    # until accelerate 1.15
    # until torch 2.13
    return versions.at_least("accelerate", "1.15.0") and versions.at_least("torch", "2.13.0")
