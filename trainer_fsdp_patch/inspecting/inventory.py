"""The role of every tensor of a model: adapter, projection, quantized or base."""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer_fsdp_patch.names import canonical

if TYPE_CHECKING:
    from typing import TypeGuard

    import torch
    from torch import nn

ADAPTER, PROJECTION, QUANTIZED, BASE = "adapter", "projection", "quantized", "base"


@dataclass(frozen=True)
class TensorInfo:
    """One parameter or buffer, taken once however many modules share it.

    Attributes:
        name: first canonical name; names: all of them.
        kind: "parameter" or "buffer".
        role: adapter (trainable), projection (frozen, owned by the adapter), quantized (base weight that is not plain
            floating point) or base.
        module: canonical name of the module that holds it under `name`.
        shape: of the full tensor; nbytes: of the full tensor.
        dtype: as stored; the class of a tensor that only looks like floating point, such as torchao's.
        trainable: whether it requires a gradient; owned: whether it sits in a module of the adapter.
        persistent: whether state dicts have it, as they have all parameters.
    """

    name: str
    names: tuple[str, ...]
    kind: str
    role: str
    module: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    trainable: bool
    owned: bool
    persistent: bool


def is_module(model: object) -> TypeGuard[nn.Module]:
    """Whether an object is a torch module; nothing is imported where nobody can hold one."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def has_adapter(model: object) -> bool:
    """Whether a PEFT method sits in the model, put there by `get_peft_model` or by transformers.

    peft is not imported: where nobody has, nobody holds an adapter.
    """
    if sys.modules.get("peft") is None or not is_module(model):
        return False
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, (PeftModel, BaseTunerLayer)) for module in model.modules())


def fsdp_version(model: nn.Module) -> int:
    """Version of FSDP that has wrapped the model or a part of it, 0 where none has."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    # Where the whole base is resident, FSDP2 has the root alone, and nothing in it.
    if hasattr(model, "_get_fsdp_state") or any(isinstance(parameter, dtensor()) for parameter in model.parameters()):
        return 2
    return int(any(isinstance(module, FullyShardedDataParallel) for module in model.modules()))


def is_unwrapped_adapter(model: nn.Module) -> bool:
    """Whether a model has an adapter and no FSDP around it or in it, as before `train()`."""
    return has_adapter(model) and not fsdp_version(model)


def is_saved_alone(model: nn.Module) -> bool:
    """Whether upstream's save of a model writes its adapter and nothing of the base.

    peft's own models and those of transformers' `add_adapter` are saved so. A base into which a user has injected an
    adapter is written tensor by tensor, as is a mixed model.

    Args:
        model: unwrapped.
    """
    from peft import PeftModel

    return isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False) is True


def is_native(model: object) -> bool:
    """Whether transformers has sharded the model over FSDP's dimension alone while it loaded it."""
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    if config is None:
        return False
    others = ("tp_size", "ep_size", "pp_size")
    alone = all((getattr(config, name, None) or 1) == 1 for name in others)
    return is_module(model) and alone and fsdp_version(model) == 2


class Slot(NamedTuple):
    """A place in a module that holds a tensor.

    Attributes:
        name: canonical name.
        kind: "parameter" or "buffer".
        key: of the tensor in its module.
        module: that holds it.
        tensor: as it was when the model was walked.
        owned: whether it sits in a module of the adapter.
    """

    name: str
    kind: str
    key: str
    module: nn.Module
    tensor: torch.Tensor
    owned: bool

    @property
    def holder(self) -> dict[str, Any]:
        """The module's own dictionary that holds the tensor."""
        slots: dict[str, Any] = self.module._parameters if self.kind == "parameter" else self.module._buffers
        return slots

    @property
    def persistent(self) -> bool:
        """Whether state dicts have the tensor."""
        return self.key not in self.module._non_persistent_buffers_set


def named_tensors(model: nn.Module) -> Iterator[Slot]:
    """Every slot of a model that holds a tensor, breadth first.

    A tensor that several modules share comes once for each module object. A module that is a child of several others
    comes once, under its first name.
    """
    seen = set()
    # What the base reaches comes first: an adapter may refer to a base module, as prompt learning does to embeddings.
    pending: dict[bool, deque[tuple[str, nn.Module]]] = {False: deque([("", model)]), True: deque()}
    while pending[False] or pending[True]:
        owned = not pending[False]
        prefix, module = pending[owned].popleft()
        if id(module) in seen:
            continue
        seen.add(id(module))
        base = _base_child(module)
        for kind, slots in (("parameter", module._parameters), ("buffer", module._buffers)):
            for key, tensor in slots.items():
                if tensor is not None:
                    name = canonical(f"{prefix}.{key}".lstrip("."))
                    yield Slot(name, kind, key, module, tensor, owned or base is not None)
        for key, child in module._modules.items():
            if child is not None:
                inside = owned if base is None else key != base
                pending[inside].append((f"{prefix}.{key}".lstrip("."), child))


def _base_child(module: nn.Module) -> str | None:
    """Child through which a PEFT container reaches the base model; all else in it is the adapter's."""
    base = next((child for container, child in _containers() if isinstance(module, container)), None)
    if base is not None and base not in module._modules:
        # X-LoRA keeps the tuner that it builds on where others keep the base.
        tuner = _containers()[1][0]
        base = next((key for key, child in module._modules.items() if isinstance(child, tuner)), base)
    return base


@functools.cache
def _containers() -> tuple[tuple[type, str], ...]:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import other

    # until peft 0.15: there is the second class alone
    auxiliary = getattr(other, "AuxiliaryTrainingWrapper", None) or other.ModulesToSaveWrapper
    return (
        (PeftModel, "base_model"),
        (BaseTuner, "model"),
        (BaseTunerLayer, "base_layer"),
        (auxiliary, "original_module"),
    )


def copied_modules(model: nn.Module) -> list[nn.Module]:
    """Full modules that are trained in place of the base's, as modules_to_save has them."""
    wrappers = filter(is_wrapper, model.modules())
    return [copy for module in wrappers for copy in getattr(module, "modules_to_save", {}).values()]


def tuners(model: nn.Module) -> set[nn.Module]:
    """PEFT's tuners in a model: what its models have as base_model, or stand around the base without one."""
    from peft.tuners.tuners_utils import BaseTuner

    modules = list(model.modules())
    tuners = {item for item in modules if isinstance(item, BaseTuner)}
    bases = (item._modules.get("base_model") for item in modules if _of_peft(item))
    return tuners | {base for base in bases if base is not None}


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's that works with a layer of the base. No model, wrapper or container is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    containers = tuple(container for container, child in _containers() if child != "base_layer")
    if isinstance(module, containers) or "base_model" in module._modules:
        return False
    return _of_peft(module) or isinstance(module, BaseTunerLayer)


def _of_peft(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.")


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is PEFT's copy-and-train wrapper around a base module, as modules_to_save makes."""
    return isinstance(module, _containers()[-1][0])


@functools.cache
def dtensor() -> Any:
    """Class of sharded tensors."""
    # until torch 2.5
    try:
        from torch.distributed.tensor import DTensor
    except ImportError:
        from torch.distributed._tensor import DTensor  # type: ignore[attr-defined, unused-ignore]
    return DTensor


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a frozen parameter stores something else than plain floating-point numbers."""
    if hasattr(tensor, "quant_state") or hasattr(tensor, "SCB") or _parts(tensor):
        return True
    return not (tensor.is_floating_point() or tensor.is_complex())


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Tensors that a tensor subclass keeps in place of plain numbers; FSDP's own class is none of these."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    data = tensor.data
    if isinstance(data, dtensor()) or not is_traceable_wrapper_subclass(data):
        return []
    return [getattr(data, name) for name in data.__tensor_flatten__()[0]]


def nbytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of those that a tensor subclass keeps in its place."""
    return sum(map(nbytes_of, _parts(tensor))) or tensor.numel() * tensor.element_size()


class Inventory(NamedTuple):
    """What one walk of a model gives.

    It refers to full tensors of the base. Who keeps it longer than FSDP takes to shard them keeps them in memory.

    Attributes:
        slots: all that hold a tensor, breadth first.
    """

    slots: tuple[Slot, ...]

    def tensors(self) -> list[TensorInfo]:
        """One entry for each distinct tensor, in the order of the slots."""
        packed = set()
        for slot in self.slots:
            frozen = slot.kind == "parameter" and not slot.tensor.requires_grad and not slot.owned
            if frozen and is_quantized(slot.tensor):
                packed.add(id(slot.module))
        return [_entry(slots, id(slots[0].module) in packed) for slots in self.shared()]

    def shared(self) -> list[list[Slot]]:
        """The slots of each distinct tensor together."""
        together: dict[int, list[Slot]] = {}
        for slot in self.slots:
            together.setdefault(id(slot.tensor), []).append(slot)
        return list(together.values())

    def names_of(self, tensors: Iterable[torch.Tensor]) -> set[str]:
        """All canonical names of some of the tensors."""
        wanted = set(map(id, tensors))
        return {slot.name for slot in self.slots if id(slot.tensor) in wanted}

    def reread(self) -> Inventory:
        """The same slots with the tensors that they hold now, after moves that may have replaced objects."""
        return Inventory(tuple(slot._replace(tensor=slot.holder[slot.key]) for slot in self.slots))


def take(model: nn.Module) -> Inventory:
    """Inventory of a model, by one walk.

    Args:
        model: any `torch.nn.Module`; meta tensors and wrapped models will do.
    """
    return Inventory(tuple(named_tensors(model)))


def _role(slot: Slot, owned: bool, packed: bool) -> str:
    if slot.tensor.requires_grad and slot.kind == "parameter":
        return ADAPTER
    if owned:
        return PROJECTION
    return QUANTIZED if packed else BASE


def _entry(slots: list[Slot], packed: bool) -> TensorInfo:
    first, tensor = slots[0], slots[0].tensor
    owned = all(slot.owned for slot in slots)
    return TensorInfo(
        name=first.name,
        names=tuple(slot.name for slot in slots),
        kind=first.kind,
        role=_role(first, owned, packed),
        module=first.name.rpartition(".")[0],
        shape=tuple(tensor.shape),
        dtype=type(tensor.data).__name__ if _parts(tensor) else str(tensor.dtype).removeprefix("torch."),
        nbytes=nbytes_of(tensor),
        trainable=bool(tensor.requires_grad),
        owned=owned,
        persistent=any(slot.persistent for slot in slots),
    )
