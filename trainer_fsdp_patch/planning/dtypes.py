"""Which dtype units have, and which frozen tensors no unit can take."""

from __future__ import annotations

from collections import Counter

from trainer_fsdp_patch.errors import PlanError
from trainer_fsdp_patch.inspecting.inventory import ADAPTER, BASE, QUANTIZED, TensorInfo
from trainer_fsdp_patch.planning.expecting import nearest


def shardable(tensor: TensorInfo) -> bool:
    """Whether a tensor of a quantized layer can go into a unit: the float-stored ones can."""
    return tensor.dtype in ("float32", "bfloat16", "float16")


def shared_by_units(tensors: list[TensorInfo], roots: list[str]) -> dict[str, str]:
    """Frozen parameters that several FSDP units share, as LoRA's layer_replication has them, with the reason.

    Args:
        tensors: of the model.
        roots: canonical names of the modules that become units.
    """
    shared = {}
    known = set(roots)
    for tensor in tensors:
        if len(tensor.names) == 1 or tensor.kind != "parameter" or tensor.role == ADAPTER:
            continue
        units = sorted({nearest(name, known) for name in tensor.names})
        if len(units) > 1:
            shared[tensor.name] = f"shared by {len(units)} units, such as {units[0] or 'the root'} and {units[1]}"
    return shared


def odd_dtypes(tensors: list[TensorInfo], roots: list[str]) -> dict[str, str]:
    """Frozen parameters whose dtype is not the prevailing one of their FSDP1 unit, with the reason.

    FSDP1 flattens a unit into one tensor, so it takes one dtype only. The smaller part stays replicated.

    Args:
        tensors: of the model.
        roots: canonical names of the modules that become units.
    """
    groups: dict[str, list[TensorInfo]] = {}
    known = set(roots)
    for tensor in tensors:
        if tensor.kind == "parameter" and tensor.role in (BASE, QUANTIZED) and shardable(tensor):
            groups.setdefault(nearest(tensor.name, known), []).append(tensor)
    odd = {}
    for unit, members in groups.items():
        sizes: Counter[str] = Counter()
        for tensor in members:
            sizes[tensor.dtype] += tensor.nbytes
        main = sizes.most_common(1)[0][0]
        for tensor in members:
            if tensor.dtype != main:
                odd[tensor.name] = f"{tensor.dtype} in the {main} unit {unit or 'at the root'}; FSDP1 takes one dtype"
    return odd


def param_dtype(
    tensors: list[TensorInfo], users: set[str], amp: str | None, asked: str | None
) -> tuple[str | None, tuple[str, ...]]:
    """Dtype of units: packed weights must not be cast, so their storage dtype decides."""
    packed = [item for item in tensors if item.role == QUANTIZED and shardable(item) and item.name not in users]
    # Next to codes of another dtype, what has this shape is scales.
    coded = {item.module for item in tensors if item.role == QUANTIZED and not shardable(item)}
    packed = [item for item in packed if len(item.shape) == 2 and item.shape[-1] == 1 and item.module not in coded]
    stored = sorted({tensor.dtype for tensor in packed})
    wanted = asked or amp
    if not stored or wanted is None or stored == [wanted]:
        return wanted, ()
    if len(stored) > 1 or asked is not None:
        raise PlanError(
            "mixed_precision_policy.param_dtype" if asked else "bnb_4bit_quant_storage",
            f"{wanted} is asked for while {packed[0].name} packs its weights into {' and '.join(stored)}",
            "The cast would change the packed bytes",
            f"Use {stored[0]} for both",
            setting="mixed_precision_policy" if asked else "bnb_4bit_quant_storage",
        )
    reason = f"param_dtype is {stored[0]}, not {wanted}: {packed[0].name} packs its weights into {stored[0]}"
    return stored[0], (reason,)
