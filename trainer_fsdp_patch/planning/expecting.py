"""What FSDP takes of a rank by a plan: units, parameter bytes between steps, and bytes gathered at once."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping
from typing import TYPE_CHECKING

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.bits import SIZES
from trainer_fsdp_patch.inspecting.inventory import BASE, QUANTIZED, TensorInfo
from trainer_fsdp_patch.inspecting.units import parts
from trainer_fsdp_patch.inspecting.walk import Walk
from trainer_fsdp_patch.measuring.footprint import Footprint

if TYPE_CHECKING:
    from torch import nn

    from trainer_fsdp_patch.planning.plan import Plan

_ALIGNED = 16
"""FSDP1 puts each original parameter of a flat one at a multiple of so many bytes."""

Units = tuple[tuple[str, tuple[str, ...]], ...]
"""Name of each unit's module, and canonical names of what it shards. The first is the root, which may have none."""


def units(
    model: nn.Module, walked: Walk, tensors: Mapping[str, Collection[str]], names: list[str], fsdp_version: int
) -> Units | None:
    """The units that FSDP will have, by the rules of a wrap policy of classes.

    Args:
        model: before FSDP takes it.
        walked: its modules.
        tensors: canonical names of what FSDP shards, with all names of each.
        names: of the modules that the policy takes, as `named_modules` has them.
        fsdp_version: 1 or 2; accelerate gives the second more units than the policy names.

    Returns:
        None where the policy takes none.
    """
    if not names:
        return None
    homes = {name: name for name in names}
    for group in _carved(model, walked, set(names)) if fsdp_version == 2 else ():
        homes |= dict.fromkeys(group, group[0])
    sharded: dict[str, list[str]] = {"": []}
    for tensor, known_as in tensors.items():
        units = {homes.get(nearest(name, homes), "") for name in known_as}
        # What several units name is in the root, or FSDP would own it twice.
        home = units.pop() if len(units) == 1 else ""
        sharded.setdefault(home, []).append(tensor)
    return tuple((home, tuple(held)) for home, held in sharded.items())


def nearest(name: str, modules: Container[str]) -> str:
    """The innermost of some modules that a tensor is in, by name; "" where it is in none.

    Args:
        name: of the tensor.
        modules: canonical names.
    """
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            return name
    return ""


def _carved(model: nn.Module, walked: Walk, names: set[str]) -> Iterator[list[str]]:
    """Modules that accelerate makes FSDP2 units next to the policy's: the embeddings, and the last norm and head."""
    from accelerate.utils import fsdp_utils

    find_norm = getattr(fsdp_utils, "_find_final_norm", None)
    if find_norm is None:
        return
    ends = [getattr(model, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
    before, after = ([item] for item in ends)
    tail = [find_norm(model), *after]
    named = walked.named(item for item in (*before, *tail) if item is not None)
    known = {id(module): name for name, module in named}
    within = parts(model, walked, [module for _, module in named])
    if _tied(*ends):
        before, tail = [], [*tail, *before]
    for group in (before, tail):
        able = [item for item in group if item is not None and id(item) in known and id(item) not in within]
        # What is inside of a unit is taken already, and what has two parents cannot be in one of them.
        taken = [item for item in able if known[id(item)] in names or nearest(known[id(item)], names)]
        if able and not taken and all(walked.parents_of(item) == 1 for item in able):
            yield [known[id(item)] for item in able]


def _tied(first: nn.Module | None, second: nn.Module | None) -> bool:
    """Whether two modules have a parameter in common; whatever peft has put around them is asked as well."""
    inside = [set() if module is None else set(map(id, module.parameters())) for module in (first, second)]
    return not inside[0].isdisjoint(inside[1])


def footprint(plan: Plan, ranks: int, *, prefetched: bool = False, gathers: int = 2) -> Footprint:
    """What the plan says that a rank takes.

    `gathered` is what the largest unit needs with those around it; the root is always one of these. FSDP2 gathers the
    next unit before it frees the last, so there it is what the largest two need. FSDP1 does so where it is asked to
    prefetch. A unit with tied parameters stays gathered next to them. The bound is reached where the largest units
    follow each other, and passed where a layer ran for the forward alone. Bytes between steps are exact, up to the few
    by which FSDP1 aligns parameters of odd sizes. Collectives are left to the comparison with stock. How often a unit
    is gathered in a step depends on which of its inputs need a gradient.

    Args:
        plan: of the model.
        ranks: that share one copy of the base.
        prefetched: whether FSDP1 was asked to.
        gathers: how often a step gathers a layer. Where that is once, all units are gathered when the forward ends.

    Returns:
        Its `units` and `gathered` are None where units do not go by class. Which modules a policy by size takes depends
        on more than the plan knows.
    """
    from trainer_fsdp_patch.planning.plan import SHARD

    parameters = [item for item in plan.placements if item.tensor.kind == "parameter"]
    tensors = {item.tensor.name: item.tensor for item in parameters}
    of_base = {name for name, tensor in tensors.items() if tensor.role in (BASE, QUANTIZED)}
    inside = {item.tensor.name for item in parameters if item.placement == SHARD}
    replicated = {name: tensor.nbytes for name, tensor in tensors.items() if name not in inside}
    rest = replicated | {name: _share(plan, tensors[name], ranks, padded=True) for name in inside}
    base = replicated | {name: _share(plan, tensors[name], ranks, padded=False) for name in inside}
    return Footprint(
        ranks=ranks,
        units=None if plan.units is None else sum(not of_base.isdisjoint(held) for _, held in plan.units),
        rest=sum(rest.values()),
        base=sum(size for name, size in base.items() if name in of_base),
        replicated=sum(size for name, size in replicated.items() if name in of_base),
        gathered=None if plan.units is None else _gathered(plan, plan.units, tensors, ranks, prefetched, gathers),
    )


def gathered_twice(model: nn.Module, walked: Walk, layers: Collection[str], fsdp_version: int) -> set[str]:
    """Names of the units that are gathered in the forward and in the backward pass, where they are freed in between.

    FSDP2 gathers the embeddings ahead in the backward pass, which has no use for them where they are frozen.

    Args:
        model: before FSDP takes it.
        walked: its modules.
        layers: names of the modules that become units by class.
        fsdp_version: 1 or 2.
    """
    from accelerate.utils import fsdp_utils

    embeddings = getattr(model, "get_input_embeddings", lambda: None)() if fsdp_version == 2 else None
    named = [walked.names[walked.places[id(embeddings)]]] if id(embeddings) in walked.places else []
    # until accelerate 1.15
    # From torch 2.8 on the root is freed as a layer is.
    freed = fsdp_version == 2 and not hasattr(fsdp_utils, "_find_final_norm") and versions.at_least("torch", "2.8.0")
    return {*layers, *named, *([""] if freed else [])}


def traffic(plan: Plan, twice: Collection[str], ranks: int, gathers: int) -> tuple[int, int]:
    """How often a step gathers a unit, and the bytes of all of these, for one forward and one backward pass.

    Args:
        plan: whose units go by class.
        twice: names of the units that are gathered in both passes; the root and the head are once.
        ranks: that share one copy of the base.
        gathers: how often a step gathers one of the former.
    """
    tensors = {item.tensor.name: item.tensor for item in plan.placements}
    times = {home: gathers if home in twice else 1 for home, held in plan.units or () if held}
    sizes = {home: _unit(plan, [tensors[name] for name in held], ranks) for home, held in plan.units or ()}
    return sum(times.values()), sum(count * sizes[home] for home, count in times.items())


def _share(plan: Plan, tensor: TensorInfo, ranks: int, *, padded: bool) -> int:
    """Bytes of a rank's part of a sharded tensor. Under FSDP2 these are rows, as many on each rank."""
    # `-(-a // b)` rounds up, here and below: FSDP pads to a multiple of the ranks.
    stored = _kept(plan, tensor)
    elements = tensor.nbytes // _itemsize(tensor)
    if plan.fsdp_version == 2:
        return elements // _rows(tensor) * -(-_rows(tensor) // ranks) * stored
    return -(-(_aligned(plan, tensor) if padded else elements) // ranks) * stored


def _gathered(
    plan: Plan, cut: Units, tensors: dict[str, TensorInfo], ranks: int, prefetched: bool, gathers: int
) -> int:
    """The largest sum over one unit, or two, and those around them; or that of all where they stay gathered."""
    sizes = {home: _unit(plan, [tensors[name] for name in held], ranks) for home, held in cut}
    if gathers == 1:
        return sum(sizes.values())
    # What is tied is used first and last, and its unit stays gathered in between.
    tied = {home for home, held in cut if any(len(tensors[name].names) > 1 for name in held)}
    chains = [{home for home in sizes if not home or f"{last}.".startswith(f"{home}.")} | tied for last in sizes]
    if plan.fsdp_version == 2 or prefetched:
        chains = [first | second for first in chains for second in chains]
    return max(sum(sizes[home] for home in chain) for chain in chains)


def _unit(plan: Plan, tensors: list[TensorInfo], ranks: int) -> int:
    """Bytes of a unit while it is gathered, in the dtype that it computes in."""
    if plan.fsdp_version == 2:
        rows = (-(-_rows(tensor) // ranks) * ranks * (tensor.nbytes // _rows(tensor)) for tensor in tensors)
        return sum(
            size // _itemsize(tensor) * _computed(plan, tensor) for size, tensor in zip(rows, tensors, strict=True)
        )
    elements = sum(_aligned(plan, tensor) for tensor in tensors)
    return -(-elements // ranks) * ranks * max((_computed(plan, tensor) for tensor in tensors), default=0)


def _aligned(plan: Plan, tensor: TensorInfo) -> int:
    """Elements of a tensor in a flat parameter, with those that FSDP1 puts before the next one."""
    step = max(1, _ALIGNED // _computed(plan, tensor))
    return -(-(tensor.nbytes // _itemsize(tensor)) // step) * step


def _rows(tensor: TensorInfo) -> int:
    return max(1, tensor.shape[0]) if tensor.shape else 1


def _itemsize(tensor: TensorInfo) -> int:
    return SIZES.get(tensor.dtype, 1)


def _kept(plan: Plan, tensor: TensorInfo) -> int:
    """Bytes of an element between steps: accelerate keeps what trains in fp32 under mixed precision.

    Under FSDP2 it leaves models with 4-bit weights as they are.
    """
    stored = _itemsize(tensor)
    if not tensor.trainable or plan.autocast is None or tensor.dtype not in SIZES:
        return stored
    packed = any(item.tensor.role == QUANTIZED and item.tensor.shape[-1:] == (1,) for item in plan.placements)
    return stored if packed and plan.fsdp_version == 2 else max(4, stored)


def _computed(plan: Plan, tensor: TensorInfo) -> int:
    """Bytes of an element while it is gathered."""
    return SIZES[plan.param_dtype] if plan.param_dtype and tensor.dtype in SIZES else _itemsize(tensor)
