"""From the inventory of a model and the settings of FSDP to a plan: pure data, no side effect."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from trainer_fsdp_patch.errors import PlanError
from trainer_fsdp_patch.inspecting.ignored_modules import names_of
from trainer_fsdp_patch.inspecting.inventory import ADAPTER, BASE, PROJECTION, QUANTIZED, Inventory, TensorInfo, take
from trainer_fsdp_patch.inspecting.tuning import READ_ELSEWHERE, ByClass, copied_modules, of_class
from trainer_fsdp_patch.inspecting.walk import Walk
from trainer_fsdp_patch.packing import planned
from trainer_fsdp_patch.planning import budget, dtypes, expecting, residence
from trainer_fsdp_patch.sizes import size

if TYPE_CHECKING:
    from torch import nn

    from trainer_fsdp_patch.measuring.memory import Room

Choice = TypeVar("Choice")
Result = TypeVar("Result")

SHARD, REPLICATE = "shard", "replicate"
_AMP = {"no": None, "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}


@dataclass(frozen=True)
class Placement:
    """Where one tensor goes, and why. `placement` is shard (FSDP owns it) or replicate."""

    tensor: TensorInfo
    placement: str
    reason: str

    @property
    def is_ignored(self) -> bool:
        """Whether the tensor has to be kept out of FSDP.

        Base buffers that no state dict has are left to it, and those that a quantizer's own `state_dict` reads.
        """
        tensor = self.tensor
        left = tensor.role == QUANTIZED or (tensor.role == BASE and not tensor.persistent)
        return self.placement == REPLICATE and not (tensor.kind == "buffer" and left)


@dataclass(frozen=True, repr=False)
class Plan:
    """What is sharded and what replicated.

    Attributes:
        fsdp_version: 1 or 2.
        placements: one for each tensor of the model.
        use_orig_params: what FSDP1 is to use, or None under FSDP2, which always keeps them.
        param_dtype: dtype in which FSDP computes and communicates units, as a name, or None for the stored one.
        autocast: dtype of the autocast around the forward, as a name, or None.
        reasons: one sentence for each flag that differs from what was asked, and one for trainable tensors that are
            sharded.
        units: the expected units of FSDP and what each shards, the root first. None where they do not go by class.
        resident: units that base_budget keeps full on each rank, and what of each.
        ranks: over which FSDP shards.
        traffic: how often a step gathers a unit, and bytes of all of these. None where units do not go by class.
    """

    fsdp_version: int
    placements: tuple[Placement, ...]
    use_orig_params: bool | None
    param_dtype: str | None
    autocast: str | None
    reasons: tuple[str, ...]
    units: expecting.Units | None = None
    resident: expecting.Units = ()
    ranks: int = 1
    traffic: tuple[int, int] | None = None

    @property
    def ignored(self) -> tuple[Placement, ...]:
        """What is kept out of FSDP."""
        return tuple(placement for placement in self.placements if placement.is_ignored)

    @property
    def sharded(self) -> tuple[Placement, ...]:
        """What is trained and sharded."""
        return tuple(item for item in self.placements if item.tensor.role == ADAPTER and item.placement == SHARD)

    @property
    def packed(self) -> dict[str, tuple[int, str]]:
        """Bytes and dtype of each quantized layer whose tensors move into one parameter, by the layer's name."""
        return planned.layers_of(item.tensor for item in self.placements if item.placement == SHARD)

    def nbytes(self, placement: str, role: str | None = None) -> int:
        """Bytes of all tensors with a placement and, where given, a role; each rank holds all replicated ones."""
        return sum(
            item.tensor.nbytes
            for item in self.placements
            if item.placement == placement and role in (None, item.tensor.role)
        )

    def costs(self) -> list[str]:
        """For each reason to replicate base parameters, the bytes that this costs each rank."""
        costs: Counter[str] = Counter()
        for item in self.placements:
            tensor = item.tensor
            if item.placement == REPLICATE and tensor.role in (BASE, QUANTIZED) and tensor.kind == "parameter":
                costs[item.reason] += tensor.nbytes
        return [f"{size(taken)} of the base full on each rank: {why}" for why, taken in costs.most_common()]

    def __repr__(self) -> str:
        return f"<Plan for FSDP{self.fsdp_version}: {self.summary()}>"

    def __str__(self) -> str:
        taken = expecting.footprint(self, self.ranks)
        lines = [f"FSDP{self.fsdp_version} on {self.ranks} ranks: {self.summary()}"]
        lines += [f"{size(taken.rest)} of parameters on each rank between steps"]
        if self.traffic is not None and taken.gathered is not None:
            lines[-1] += f", and at most {size(taken.gathered)} of gathered units"
            lines += [f"{self.traffic[0]} gathers in forward and backward, of {size(self.traffic[1])}"]
        return "\n".join(f"{line}." for line in [*lines, *self.reasons, *self.costs()][:10])

    def summary(self) -> str:
        """One line: how many tensors and bytes are sharded and replicated, by role."""
        parts = []
        for placement in (SHARD, REPLICATE):
            kept = [item for item in self.placements if item.placement == placement]
            roles = Counter(item.tensor.role for item in kept)
            detail = ", ".join(f"{count} {role}" for role, count in sorted(roles.items()))
            parts.append(f"{placement} {size(self.nbytes(placement))} ({detail or 'nothing'})")
        if self.resident:
            parts.append(f"{len(self.resident)} units of the base resident")
        return "; ".join(parts)


def make_plan(
    model: nn.Module,
    *,
    fsdp_version: int = 2,
    mixed_precision: str = "no",
    use_orig_params: bool | None = None,
    ignored_modules: str | Iterable[nn.Module] | None = None,
    param_dtype: str | None = None,
    units: Iterable[str] | None = None,
    adapter_placement: str | None = None,
    adapter_budget: int | None = None,
    base_budget: int | str | None = None,
    ranks: int = 1,
    gathers: int = 2,
    room: Room | None = None,
    unsharded: str = "",
    inventory: Inventory | None = None,
) -> Plan:
    """Plan for one model; the model is read and not changed.

    Args:
        model: `torch.nn.Module` with a PEFT adapter; meta tensors will do.
        fsdp_version: 1 or 2.
        mixed_precision: "no", "bf16", "fp16" or "fp8", as accelerate has it.
        use_orig_params: FSDP1's flag; None is True.
        ignored_modules: the user's own, modules or a regular expression of their full names.
        param_dtype: the user's own dtype for units, such as "bfloat16"; None is what mixed_precision gives.
        units: class names of the modules that become FSDP units; None is the model's `_no_split_modules`.
        adapter_placement: "auto", "replicate" or "shard", for trainable tensors; None is what `patch()` was given.
        adapter_budget: bytes that a replicated adapter may cost each rank under "auto", with its gradients and its
            optimizer state. None is what `patch()` was given.
        base_budget: bytes that each rank may hold of the base beyond its shards. It is a number, a text such as "8GiB"
            or "25%", "auto", or None for what `patch()` was given.
        ranks: over which FSDP shards.
        gathers: how often a step gathers a layer; once where it stays gathered from the forward to the backward pass.
        room: what each rank has room for under "auto"; None asks the device of this process.
        unsharded: why no trainable tensor may be sharded, or "".
        inventory: of the model, where it was taken already.

    Returns:
        The plan.

    Raises:
        PlanError: a setting is unknown or contradicts the model.
    """
    amp = _known("mixed_precision", mixed_precision, _AMP)
    _known("fsdp_version", fsdp_version, {1: None, 2: None})
    inventory = inventory or take(model)
    tensors = inventory.tensors()
    users = names_of(model, ignored_modules, inventory)
    roots = _roots(model, inventory.walked, units)

    def odd_in(tensors: list[TensorInfo]) -> dict[str, str]:
        return dtypes.odd_dtypes(tensors, roots) if fsdp_version == 1 else {}

    shared = dtypes.shared_by_units(tensors, roots)
    compute, reasons = dtypes.param_dtype(tensors, users, amp, param_dtype)
    known = set(roots)
    within = planned.Asked(fsdp_version, compute, ranks, {*users, *shared}, lambda name: expecting.nearest(name, known))
    tensors, originals = planned.with_packed(tensors, inventory, within, odd_in)
    odd = odd_in(tensors) | shared
    further = inventory.further_names()
    asked = budget.Settings(
        adapter_placement or budget.settings.adapter_placement,
        budget.settings.adapter_budget if adapter_budget is None else adapter_budget,
    )
    budget.check_settings(asked.adapter_placement, asked.adapter_budget)
    homes, copies = _homes(tensors, further, roots), _inside(inventory, copied_modules)
    unable = budget.cannot_shard(tensors, fsdp_version, homes, copies) | dict.fromkeys(users, "it is ignored")
    unable |= dict.fromkeys(inventory.hooked(), "hooks work on its gradient, and FSDP makes another parameter")
    unable |= {name: why for found, why in READ_ELSEWHERE for name in _inside(inventory, found)}
    if fsdp_version == 1 and use_orig_params is False:
        unsharded = unsharded or "use_orig_params=False hides its name"
    if unsharded:
        unable |= dict.fromkeys((tensor.name for tensor in tensors), unsharded)
    large, said = budget.choose_sharded(tensors, unable, asked, ranks)
    # One table for both: `odd` has frozen tensors, which it keeps replicated, and `large` trainable ones to shard.
    # No name is in both, and `_decide` asks for the role of a tensor before it reads the entry.
    placements = tuple(_decide(tensor, users, odd | large, fsdp_version) for tensor in tensors)
    if not any(item.placement == SHARD for item in placements):
        _refuse_nothing("ignored_modules" if users else "fsdp")
    flag = _orig_params(fsdp_version, use_orig_params)
    names = {item.name: (*item.names, *further.get(item.name, ())) for item in tensors if item.kind == "parameter"}
    held = [item.tensor.name for item in placements if item.placement == SHARD and item.tensor.name in names]
    cut = expecting.units(model, inventory.walked, {name: names[name] for name in held}, roots, fsdp_version)
    plan = Plan(fsdp_version, placements, flag, compute, amp, (*reasons, *said), cut)
    wanted = residence.asked(base_budget, budget.settings.base_budget)
    # Where units go by size, the layers of the model are what a budget keeps.
    layers = roots or _roots(model, inventory.walked, None)
    if wanted is not None:
        base = residence.Base(model, inventory.walked, names, layers, originals)
        plan = residence.budgeted(plan, base, wanted, ranks, gathers, room)
    twice = expecting.gathered_twice(model, inventory.walked, layers, fsdp_version)
    traffic = None if plan.units is None else expecting.traffic(plan, twice, ranks, gathers)
    return dataclasses.replace(plan, ranks=ranks, traffic=traffic)


def _refuse_nothing(setting: str) -> None:
    raise PlanError(
        setting,
        "no parameter of the model is left to shard",
        "FSDP has nothing to do",
        "Ignore fewer modules, or train without FSDP",
        setting=setting,
    )


def _known(setting: str, value: Choice, supported: Mapping[Choice, Result]) -> Result:
    if value not in supported:
        raise PlanError(
            setting, repr(value), "No plan was made", f"Use one of {', '.join(map(repr, supported))}", setting=setting
        )
    return supported[value]


def _orig_params(fsdp_version: int, asked: bool | None) -> bool | None:
    """No unit mixes trainable and frozen parameters, so both values of the flag are right."""
    given = True if asked is None else asked
    return given if fsdp_version == 1 else None


def _decide(tensor: TensorInfo, users: set[str], odd: dict[str, str], fsdp_version: int) -> Placement:
    if tensor.role == ADAPTER and tensor.name in odd:
        return Placement(tensor, SHARD, odd[tensor.name])
    if tensor.role == ADAPTER:
        return Placement(tensor, REPLICATE, "trainable: full on every rank, its gradient averaged once per step")
    if tensor.role == PROJECTION:
        return Placement(tensor, REPLICATE, "frozen and owned by the adapter: full on every rank, bit for bit")
    if tensor.kind == "buffer":
        return Placement(tensor, REPLICATE, "buffer: FSDP never shards buffers")
    if tensor.name in users:
        return Placement(tensor, REPLICATE, "in the user's ignored_modules")
    if tensor.role == QUANTIZED and not dtypes.shardable(tensor):
        return Placement(tensor, REPLICATE, f"stored as {tensor.dtype} in a quantized layer, which FSDP cannot shard")
    if tensor.name in odd:
        return Placement(tensor, REPLICATE, odd[tensor.name])
    if planned.is_packed(tensor):
        return Placement(tensor, SHARD, f"{planned.REASON}, sharded by FSDP{fsdp_version}")
    return Placement(tensor, SHARD, f"frozen base weight: sharded by FSDP{fsdp_version}")


def _inside(inventory: Inventory, found: Callable[[ByClass], list[nn.Module]]) -> set[str]:
    """Names of the parameters of some of peft's modules."""
    parameters = [item for module in found(inventory.walked.by_class) for item in module.parameters()]
    return inventory.names_of(parameters) if parameters else set()


def _roots(model: nn.Module, walked: Walk, units: Iterable[str] | None) -> list[str]:
    """Names of the modules that become FSDP units, the root aside; nested ones are listed too."""
    classes = set(units if units is not None else getattr(model, "_no_split_modules", None) or ())
    return [name for name, _ in walked.named(of_class(walked.by_class, lambda kind: kind.__name__ in classes))]


def _homes(tensors: list[TensorInfo], further: dict[str, list[str]], roots: list[str]) -> dict[str, set[str]]:
    """The units that each parameter is reached in, by its name. A module may be a child of several."""
    known = set(roots)
    return {
        tensor.name: {expecting.nearest(name, known) for name in (*tensor.names, *further.get(tensor.name, ()))}
        for tensor in tensors
        if tensor.role == ADAPTER
    }
