"""What fits a rank's memory, and the lines that ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.estimating import settings
from trainer_fsdp_patch.estimating.estimate import Estimate
from trainer_fsdp_patch.measuring import memory
from trainer_fsdp_patch.reporting.making import Maker

MIB = 2**20
_MOST_RANKS = 1024


class Fit(NamedTuple):
    """What was found.

    Attributes:
        estimate: that fits, or the one that lacks the least.
        fits: whether it does.
        usable: bytes of the device without its margin.
        accumulation: steps over which a batch is taken.
        budget: of the base, as `patch()` takes it, or "".
        ranks: number of ranks with which the estimate would fit; None where it fits, or no such number is known.
    """

    estimate: Estimate
    fits: bool
    usable: int
    accumulation: int
    budget: str
    ranks: int | None = None

    @property
    def lacking(self) -> int:
        """Bytes that are missing."""
        return max(0, self.estimate.peak - self.usable)


def fit(maker: Maker) -> Fit:
    """The first set-up that fits.

    FSDP's version is that which was asked for, and then the other one. The batch is kept as long as it fits with layers
    that are recomputed. Then it is taken in parts. What is left is for units of the base that stay full.

    Args:
        maker: of the model, asked with a memory.

    Raises:
        PlanError: a setting contradicts the model.
    """
    size = int(maker.asked.memory or 0)
    usable = size - size // memory.MARGIN
    best: Estimate | None = None
    for found in _tried(maker):
        if found.peak <= usable and not found.unknown:
            best, kept = _with_budget(maker, found, usable)
            return Fit(best, True, usable, maker.asked.rows // found.rows, kept)
        best = found if best is None or found.peak < best.peak else best
    assert best is not None
    budget = maker.asked.base_budget or ""
    # Where activations are not known, nothing is known to fit.
    return Fit(best, False, usable, maker.asked.rows // best.rows, budget, _with_more_ranks(maker, best, usable))


def _tried(maker: Maker) -> Iterator[Estimate]:
    """Set-ups in the order in which they are wanted."""
    rows = [count for count in range(maker.asked.rows, 0, -1) if maker.asked.rows % count == 0]
    first = maker.fsdp.version
    # A file with classes or flags of its own stands for its version.
    both = maker.asked.fsdp in (None, "1", "2") and settings.newest() == 2
    versions_tried = (first, 3 - first) if both else (first,)
    for version in versions_tried:
        plan = maker.plan(version)
        for count in rows:
            for checkpointing in (True,) if maker.fsdp.checkpointing else (False, True):
                yield maker.estimate(plan, count, checkpointing=checkpointing)


def _with_more_ranks(maker: Maker, found: Estimate, usable: int) -> int | None:
    """The first doubled number of ranks with which a set-up fits."""
    if found.unknown or not maker.fsdp.shards:
        return None
    ranks = found.plan.ranks
    while (ranks := 2 * ranks) <= _MOST_RANKS:
        plan = maker.plan(found.plan.fsdp_version, ranks=ranks)
        if maker.estimate(plan, found.rows, checkpointing=found.checkpointing).peak <= usable:
            return ranks
    return None


def _with_budget(maker: Maker, found: Estimate, usable: int) -> tuple[Estimate, str]:
    """The same with as much of the base full on each rank as is left, in MiB."""
    if maker.asked.base_budget or found.plan.ranks == 1:
        return found, maker.asked.base_budget or ""
    left = (usable - found.peak) // MIB
    while left > 0:
        plan = maker.plan(found.plan.fsdp_version, f"{left}MiB")
        more = maker.estimate(plan, found.rows, checkpointing=found.checkpointing)
        if not plan.resident or more.peak <= usable:
            return (more, f"{left}MiB") if plan.resident else (found, "")
        # What a budget counts is not all that a unit takes, such as the scales of quantized layers.
        left -= -(-(more.peak - usable) // MIB)
    return found, ""


def arguments(maker: Maker, found: Estimate, accumulation: int = 1) -> dict[str, object]:
    """TrainingArguments of a set-up, by name.

    Args:
        maker: of the model.
        found: the set-up.
        accumulation: steps over which a batch is taken.
    """
    plan = found.plan
    config: dict[str, object] = {}
    precision = maker.asked.mixed_precision
    # until transformers 5.10
    named = versions.at_least("transformers", "5.10.0")
    config["version"] = plan.fsdp_version
    config |= {"activation_checkpointing": True} if found.checkpointing else {}
    if plan.fsdp_version == 1 and plan.use_orig_params is False:
        config["use_orig_params"] = False
    if maker.fsdp.gathers == 1:
        config["reshard_after_forward"] = "shard_grad_op" if plan.fsdp_version == 1 else False
    if maker.fsdp.units:
        config["transformer_layer_cls_to_wrap"] = list(maker.fsdp.units)
    return {
        "per_device_train_batch_size": found.rows,
        **({"gradient_accumulation_steps": accumulation} if accumulation > 1 else {}),
        **({precision: True} if precision in ("bf16", "fp16") else {}),
        "optim": maker.asked.optim,
        "fsdp": True if named else "full_shard auto_wrap",
        "fsdp_config": config,
    }


def script(maker: Maker, found: Estimate, accumulation: int = 1, budget: str = "") -> str:
    """Lines of Python to paste.

    Args:
        maker: of the model.
        found: the set-up.
        accumulation: steps over which a batch is taken.
        budget: of the base, or "".
    """
    lines = [f'trainer_fsdp_patch.patch(base_budget="{budget}")' if budget else "trainer_fsdp_patch.patch()"]
    given = arguments(maker, found, accumulation)
    inside = [f"    {name}={_literal(value)}," for name, value in given.items()]
    return "\n".join([*lines, "arguments = TrainingArguments(", '    "out",', *inside, ")"])


def _literal(value: object) -> str:
    """As a formatter would write it."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}": {_literal(item)}' for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return str(value)


def yaml(maker: Maker, found: Estimate, budget: str = "") -> str:
    """Lines of an accelerate YAML to paste.

    Args:
        maker: of the model.
        found: the set-up.
        budget: of the base, or "".
    """
    plan = found.plan
    after = {1: "FULL_SHARD", 2: "true"} if maker.fsdp.gathers == 2 else {1: "SHARD_GRAD_OP", 2: "false"}
    # until accelerate 1.6
    strategy = "reshard_after_forward" if versions.at_least("accelerate", "1.6.0") else "sharding_strategy"
    lines = [
        "distributed_type: FSDP",
        f"mixed_precision: '{maker.asked.mixed_precision}'",
        f"num_processes: {maker.asked.ranks}",
        "fsdp_config:",
        f"  fsdp_version: {plan.fsdp_version}",
        "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP",
        f"  fsdp_{strategy}: {after[plan.fsdp_version]}",
        f"  fsdp_activation_checkpointing: {str(found.checkpointing).lower()}",
    ]
    if maker.fsdp.units:
        lines.append(f"  fsdp_transformer_layer_cls_to_wrap: {','.join(maker.fsdp.units)}")
    if plan.fsdp_version == 1:
        lines.append(f"  fsdp_use_orig_params: {str(plan.use_orig_params).lower()}")
    # accelerate knows of no budget.
    lines += [f"# in the environment: TRAINER_FSDP_PATCH_BASE_BUDGET={budget}"] if budget else []
    return "\n".join(lines)
