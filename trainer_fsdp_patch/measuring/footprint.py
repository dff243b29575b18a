"""What FSDP takes of a rank: units, parameter bytes between steps, and the most that is gathered at once.

Numbers are exact and of no clock. They come from the storages that FSDP fills and frees, not from the states that it
thinks it is in. They are read wherever the sum can rise. That is after each `unshard` of each unit, and under FSDP2
after the wait that follows. Between two of these points storages are only freed, so that no peak is missed. From torch
2.2 on, every way to a gathered parameter goes through these methods. Forward, backward, prefetching, state dicts and
`summon_full_params` all do. They are shadowed on the units of one model, and no class is changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer_fsdp_patch.inspecting import leaves
from trainer_fsdp_patch.inspecting.inventory import BASE, QUANTIZED, TensorInfo, fsdp_version
from trainer_fsdp_patch.names import PACKED, canonical
from trainer_fsdp_patch.shadowing import shadowed

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.fsdp._flat_param import FlatParamHandle
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState


@dataclass(frozen=True)
class Footprint:
    """What a run takes of a rank, or is planned to take; None is for what nobody knows.

    Attributes:
        ranks: that share one copy of the base.
        units: those of FSDP that hold parameters of the base; one for each adapter matrix is no merit.
        rest: bytes of all parameters between steps: replicated ones, padded shards and what is still gathered then.
        base: the part of `rest` that is the base's; under FSDP1 without padding.
        replicated: the part of `base` that is in no unit, which every rank has.
        gathered: the largest number of bytes that units had gathered at once, as FSDP stores them, padding included.
        collectives: in a step, the largest number.
        statistics: bytes that quantized layers keep in other tensors than parameters, such as scales, on each rank.
    """

    ranks: int
    units: int | None
    rest: int
    base: int
    replicated: int
    gathered: int | None
    collectives: int | None = None
    statistics: int = 0

    def together(self, other: Footprint) -> Footprint:
        """The larger of each number, of two steps."""
        larger = {name: max(value, vars(other)[name]) for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(other, **larger)

    @property
    def sharded(self) -> int:
        """Bytes of a rank's part of the base that FSDP holds."""
        return self.base - self.replicated


class Unit:
    """One flat parameter of FSDP1, or one group of FSDP2.

    Attributes:
        owner: FSDP's object for it.
        elements: number of elements of each parameter, by its first canonical name.
        names: all of its names in the module that FSDP took it from, by the first.
        aliases: names in other modules, of all parameters.
    """

    points: tuple[str, ...] = ("unshard",)

    def __init__(self, owner: object, elements: dict[str, int], names: dict[str, set[str]], aliases: set[str]) -> None:
        self.owner, self.elements, self.names, self.aliases = owner, elements, names, aliases

    def of(self, names: set[str]) -> list[str]:
        """First names of those parameters that have one of these names."""
        return [first for first, own in self.names.items() if not own.isdisjoint(names)]

    @property
    def ranks(self) -> int:
        """How many share one copy of it."""
        raise NotImplementedError

    def shards(self) -> dict[str, int]:
        """Bytes of this rank's part of each parameter."""
        raise NotImplementedError

    def held(self) -> int:
        """Bytes of all of these, with FSDP's padding."""
        return sum(self.shards().values())

    def gathered(self) -> int:
        """Bytes of what is gathered now."""
        raise NotImplementedError


class FlatUnit(Unit):
    """FSDP1's: `owner` is a FlatParamHandle."""

    owner: FlatParamHandle

    @property
    def ranks(self) -> int:
        return int(self.owner.world_size) if self.owner.uses_sharded_strategy else 1

    def shards(self) -> dict[str, int]:
        # A rank holds one slice of them all. An even share of each, rounded up, does not depend on their order.
        size = self.owner.flat_param.element_size()
        return {name: -(-count // self.ranks) * size for name, count in self.elements.items()}

    def held(self) -> int:
        return _stored(getattr(self.owner.flat_param, "_local_shard", self.owner.flat_param))

    def gathered(self) -> int:
        flat = self.owner.flat_param
        if not self.owner.uses_sharded_strategy:
            return 0
        names = ("_full_param_padded", "_full_prec_full_param_padded")
        return sum(_stored(getattr(flat, name)) for name in names if hasattr(flat, name))


class GroupUnit(Unit):
    """FSDP2's: `owner` is an FSDPParamGroup."""

    owner: FSDPParamGroup

    points = ("unshard", "wait_for_unshard")

    @property
    def ranks(self) -> int:
        return int(getattr(self.owner.mesh_info, "shard_mesh_size", 1))

    def shards(self) -> dict[str, int]:
        sizes = (_stored(item._sharded_param_data) for item in self.owner.fsdp_params)
        return dict(zip(self.elements, sizes, strict=True))

    def gathered(self) -> int:
        # A unit that is asked for counts from then on. While it is copied out of the buffer it exists twice for a
        # moment. That is so for every unit and counts once.
        pending = getattr(self.owner, "_all_gather_result", None)
        arriving = _stored(pending.all_gather_output) if pending is not None else 0
        outputs = [tensor for item in self.owner.fsdp_params for tensor in item.all_gather_outputs]
        return max(arriving, sum(map(_stored, outputs)))


def _may_be_packed(item: TensorInfo) -> bool:
    return item.kind == "buffer" and item.persistent and "int" in item.dtype


def _stored(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().nbytes()) if not tensor.is_meta else 0


def units(model: nn.Module) -> list[Unit]:
    """FSDP's units of a wrapped model that have parameters, those of several modules once.

    Args:
        model: wrapped; an unwrapped one has none.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(canonical(name))
    by_owner: dict[int, Unit] = {}
    for module in model.modules():
        handle = getattr(module, "_handle", None) if isinstance(module, FullyShardedDataParallel) else None
        if handle is not None:
            by_owner[id(handle)] = _flat(handle, names)
        for group in groups(module):
            by_owner[id(group)] = _group(group, names)
    return list(by_owner.values())


def state_of(module: nn.Module) -> FSDPState | None:
    """FSDP2's state of a module that is one of its units, or None."""
    get = getattr(module, "_get_fsdp_state", None)
    state: FSDPState | None = None if get is None else get()
    return state


def groups(module: nn.Module) -> list[FSDPParamGroup]:
    """FSDP2's groups of a module. A module has one before torch 2.12."""
    state = state_of(module)
    if state is None:
        return []
    groups = getattr(state, "_fsdp_param_groups", None)
    return [group for group in (groups if groups is not None else [state._fsdp_param_group]) if group is not None]


def _flat(handle: FlatParamHandle, names: dict[int, list[str]]) -> Unit:
    flat = handle.flat_param
    own = [_join(names, info.module, info.param_name) for info in flat._param_infos]
    others = [_join(names, info.module, info.param_name) for info in flat._shared_param_infos]
    # The list of numbers of elements has FSDP's padding in it, that of shapes has not.
    return _unit(FlatUnit, handle, own, others, [int(shape.numel()) for shape in flat._shapes])


def _group(group: FSDPParamGroup, names: dict[int, list[str]]) -> Unit:
    infos = [item._module_info for item in group.fsdp_params]
    own = [_join(names, info.module, info.param_name) for info in infos]
    others = [
        _join(names, module, name)
        for info in infos
        for module, name in zip(info.shared_modules, info.shared_param_names, strict=True)
    ]
    return _unit(GroupUnit, group, own, others, [int(item._orig_size.numel()) for item in group.fsdp_params])


def _unit(kind: type[Unit], owner: object, own: list[list[str]], others: list[list[str]], counts: list[int]) -> Unit:
    """A unit from all names of each parameter: a module may be a child of several others."""
    elements = {together[0]: count for together, count in zip(own, counts, strict=True)}
    return kind(owner, elements, {together[0]: set(together) for together in own}, {n for some in others for n in some})


def _join(names: dict[int, list[str]], module: nn.Module, key: str) -> list[str]:
    return [f"{name}.{key}".lstrip(".") for name in names.get(id(module), [""])]


@dataclass
class Watch:
    """Counts a model's gathered bytes from `watching` on.

    Attributes:
        model: wrapped by FSDP.
        tensors: the model's inventory from before it was wrapped, which knows the base's parameters by name.
        peak: the largest sum so far.
    """

    model: nn.Module
    tensors: Iterable[TensorInfo]
    peak: int = 0
    units: list[Unit] = field(default_factory=list)

    def __post_init__(self) -> None:
        of_base = [item for item in self.tensors if item.role in (BASE, QUANTIZED) and item.kind == "parameter"]
        self.base = {name for item in of_base for name in item.names}
        # The bytes of a quantized layer may have moved into one parameter of it, whatever they were in before.
        self.base |= {f"{item.module}.{PACKED}" for item in self.tensors if item.role in (BASE, QUANTIZED)}
        self.units = units(self.model)

    def sample(self) -> int:
        """Bytes that are gathered now; the peak is kept."""
        now = sum(unit.gathered() for unit in self.units)
        self.peak = max(self.peak, now)
        return now

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around steps."""
        with contextlib.ExitStack() as stack:
            for unit in self.units:
                replaced = {name: self._sampled(getattr(unit.owner, name)) for name in unit.points}
                stack.enter_context(shadowed(unit.owner, **replaced))
            self.sample()
            yield

    def _sampled(self, upstream: Callable[..., object]) -> Callable[..., object]:
        def sampled(*args: object, **kwargs: object) -> object:
            result = upstream(*args, **kwargs)
            self.sample()
            return result

        return sampled

    def statistics(self) -> int:
        """Bytes that quantized layers keep in other tensors than parameters, and FSDP has not sharded."""
        names = {item.module for item in self.tensors if item.role == QUANTIZED or _may_be_packed(item)}
        layers = [module for name, module in self.model.named_modules() if canonical(name) in names]
        return leaves.statistics(layers)

    def replicated(self) -> dict[str, int]:
        """Bytes of each parameter outside of units, by canonical name."""
        from trainer_fsdp_patch.inspecting.inventory import dtensor, nbytes_of

        inside = {name for unit in self.units for name in unit.aliases.union(*unit.names.values())}
        flat = {id(getattr(unit.owner, "flat_param", None)) for unit in self.units}
        held = {}
        for name, parameter in self.model.named_parameters():
            if canonical(name) not in inside and id(parameter) not in flat:
                local = parameter.to_local() if isinstance(parameter, dtensor()) else parameter
                held[canonical(name)] = nbytes_of(local)
        return held

    def footprint(self, collectives: int | None = None, before: Footprint | None = None) -> Footprint | None:
        """What has been seen, between steps; None where FSDP has not taken the model.

        Args:
            collectives: of the last step.
            before: what was seen in the steps before; the larger numbers stay.
        """
        if not self.units and not fsdp_version(self.model):
            return None
        left, replicated = self.sample(), self.replicated()
        parts = [(unit.shards(), unit.of(self.base)) for unit in self.units]
        of_base = sum(size for name, size in replicated.items() if name in self.base)
        now = Footprint(
            # Without a unit there is one copy of the base on each rank.
            ranks=self.units[0].ranks if self.units else 1,
            units=sum(bool(of_unit) for _, of_unit in parts),
            rest=left + sum(replicated.values()) + sum(unit.held() for unit in self.units),
            base=left + of_base + sum(shards[name] for shards, of_unit in parts for name in of_unit),
            replicated=of_base,
            gathered=self.peak,
            collectives=collectives,
            statistics=self.statistics(),
        )
        return now if before is None else before.together(now)
