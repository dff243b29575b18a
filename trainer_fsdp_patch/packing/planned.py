"""Quantized layers in a plan: one frozen parameter that FSDP shards stands for the tensors that move into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import NamedTuple

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.bits import SIZES
from trainer_fsdp_patch.inspecting.inventory import BASE, QUANTIZED, Inventory, TensorInfo
from trainer_fsdp_patch.names import PACKED
from trainer_fsdp_patch.packing import refusing, units
from trainer_fsdp_patch.packing.choosing import Candidate, candidates

Originals = dict[str, tuple[TensorInfo, ...]]
"""The tensors that move into a packed parameter, by its name."""

REASON = "quantized: the layer's bytes are one frozen parameter"


class Asked(NamedTuple):
    """What decides whether and how layers are packed.

    Attributes:
        fsdp_version: 1 or 2.
        param_dtype: in which FSDP computes units, as a name, or None for the stored one.
        ranks: over which FSDP shards.
        barred: canonical names of tensors that a user ignores, or that several units share.
        unit: name of the unit that a name is in.
    """

    fsdp_version: int
    param_dtype: str | None
    ranks: int
    barred: set[str]
    unit: Callable[[str], str]


def with_packed(
    tensors: list[TensorInfo],
    taken: Inventory,
    asked: Asked,
    odd: Callable[[list[TensorInfo]], dict[str, str]],
) -> tuple[list[TensorInfo], Originals]:
    """The same tensors, with one for each layer that is packed in the place of those that move into it.

    Args:
        tensors: of the model.
        taken: its inventory.
        asked: settings of the run.
        odd: gives the names of those tensors whose dtype their unit cannot take.

    Returns:
        The tensors, and those that each packed one stands for.

    Raises:
        PlanError: layers are still to be rebuilt in the first forward.
    """
    quantized = any(item.role == QUANTIZED or _is_integer_buffer(item) for item in tensors)
    if quantized:
        refusing.refuse_rebuilt(taken)
    if not quantized or asked.ranks == 1 or not units.is_followed(asked.fsdp_version):
        return tensors, {}
    chosen = candidates(taken, asked.barred)
    packed = _replaced(tensors, chosen, asked)
    refused = odd(packed).keys() | _mixed(packed, asked)
    able = [item for item in chosen if f"{item.name}.{PACKED}" not in refused]
    packed = packed if able == chosen else _replaced(tensors, able, asked)
    return packed, {f"{item.name}.{PACKED}": _named(tensors, item.names) for item in able}


def _mixed(tensors: list[TensorInfo], asked: Asked) -> set[str]:
    """Packed tensors whose unit holds other dtypes too, where FSDP2 takes one dtype a unit."""
    # until torch 2.8
    if asked.fsdp_version == 1 or versions.at_least("torch", "2.8.0"):
        return set()
    stored: dict[str, set[str]] = {}
    for tensor in tensors:
        if tensor.kind == "parameter" and tensor.role in (BASE, QUANTIZED):
            stored.setdefault(asked.unit(tensor.name), set()).add(tensor.dtype)
    return {item.name for item in tensors if is_packed(item) and len(stored[asked.unit(item.name)]) > 1}


def _named(tensors: list[TensorInfo], names: Collection[str]) -> tuple[TensorInfo, ...]:
    return tuple(item for item in tensors if item.name in names)


def _replaced(tensors: list[TensorInfo], chosen: list[Candidate], asked: Asked) -> list[TensorInfo]:
    moving = {name for item in chosen for name in item.names}
    layers = {item.name for item in chosen}
    # What is left of a packed layer is saved and moved as any module's.
    kept = [
        replace(item, role=BASE) if item.module in layers and item.kind == "buffer" else item
        for item in tensors
        if item.name not in moving
    ]
    dtype = _dtypes(kept, asked)
    return kept + [_packed(item.name, item.nbytes, dtype(f"{item.name}.{PACKED}")) for item in chosen]


def _is_integer_buffer(tensor: TensorInfo) -> bool:
    return tensor.kind == "buffer" and tensor.persistent and "int" in tensor.dtype


def _dtypes(tensors: list[TensorInfo], asked: Asked) -> Callable[[str], str]:
    """The dtype in which FSDP casts no tensor of a unit: that of its compute, else what most of the unit has."""
    if asked.param_dtype is not None:
        return lambda name: str(asked.param_dtype)
    sizes: dict[str, Counter[str]] = {}
    for tensor in tensors:
        if tensor.kind == "parameter" and tensor.role in (BASE, QUANTIZED) and tensor.dtype in SIZES:
            for unit in {asked.unit(tensor.name), ""}:
                sizes.setdefault(unit, Counter())[tensor.dtype] += tensor.nbytes
    main = {unit: counts.most_common(1)[0][0] for unit, counts in sizes.items()}
    return lambda name: main.get(asked.unit(name), main.get("", "bfloat16"))


def _packed(layer: str, nbytes: int, dtype: str) -> TensorInfo:
    elements = -(-nbytes // SIZES[dtype])
    name = f"{layer}.{PACKED}"
    return TensorInfo(
        name=name,
        names=(name,),
        kind="parameter",
        role=QUANTIZED,
        module=layer,
        shape=(elements,),
        dtype=dtype,
        nbytes=elements * SIZES[dtype],
        trainable=False,
        owned=False,
        persistent=True,
    )


def layers_of(tensors: Iterable[TensorInfo]) -> dict[str, tuple[int, str]]:
    """Bytes and dtype of each packed layer among the tensors of a plan, by the name of the layer."""
    return {item.module: (item.nbytes, item.dtype) for item in tensors if is_packed(item)}


def is_packed(tensor: TensorInfo) -> bool:
    """Whether a tensor of a plan stands for a packed layer."""
    return tensor.role == QUANTIZED and tensor.name.endswith(f".{PACKED}")
