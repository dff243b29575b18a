"""The role of every tensor of a model: adapter, projection, quantized or base."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer_fsdp_patch.inspecting import walk

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
    return _slots(walk.take(model))


def _slots(walked: walk.Walk) -> Iterator[Slot]:
    for place in walked.holders:
        name, module, owned = walked.names[place], walked.modules[place], walked.owned[place]
        prefix = f"{name}." if name else ""
        for kind, slots in (("parameter", module._parameters), ("buffer", module._buffers)):
            for key, tensor in slots.items():
                if tensor is not None:
                    yield Slot(f"{prefix}{key}", kind, key, module, tensor, owned)


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
    # What FP8 layers keep needs its scales, as integers do.
    return tensor.element_size() == 1 or not (tensor.is_floating_point() or tensor.is_complex())


@functools.cache
def _plain() -> tuple[type, ...]:
    import torch

    return torch.Tensor, torch.nn.Parameter


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Tensors that a tensor subclass keeps in place of plain numbers."""
    # Most tensors are of the plain classes, and have nothing inside.
    data = tensor if type(tensor) in _plain() else tensor.data
    return [getattr(data, name) for name in inner_names(data)]


def inner_names(tensor: torch.Tensor) -> tuple[str, ...]:
    """Attributes of the tensors that a tensor subclass is made of; FSDP's own class is none of these."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    plain = type(tensor) in _plain() or isinstance(tensor, dtensor())
    if plain or not is_traceable_wrapper_subclass(tensor):
        return ()
    return tuple(tensor.__tensor_flatten__()[0])


def nbytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of those that a tensor subclass keeps in its place."""
    parts = _parts(tensor)
    return (sum(map(nbytes_of, parts)) if parts else 0) or tensor.numel() * tensor.element_size()


class Inventory(NamedTuple):
    """What one walk of a model gives.

    It refers to full tensors of the base. Who keeps it longer than FSDP takes to shard them keeps them in memory.

    Attributes:
        slots: all that hold a tensor, breadth first.
        walked: the modules.
    """

    slots: tuple[Slot, ...]
    walked: walk.Walk

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

    def further_names(self) -> dict[str, list[str]]:
        """More names of parameters, in modules that are children of several others, by first canonical name."""
        more: dict[int, list[str]] = {}
        for name, module in self.walked.further:
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    more.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
        firsts = {id(slot.tensor): slot.name for slot in reversed(self.slots)} if more else {}
        return {firsts[key]: names for key, names in more.items()}

    def hooked(self) -> set[str]:
        """Names of tensors on whose gradients hooks work, as OSF's and users' own do."""
        hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
        return {slot.name for slot in self.slots if any(getattr(slot.tensor, name, None) for name in hooks)}

    def reread(self) -> Inventory:
        """The same slots with the tensors that they hold now, after moves that may have replaced objects."""
        return self._replace(slots=tuple(slot._replace(tensor=slot.holder[slot.key]) for slot in self.slots))


def take(model: nn.Module) -> Inventory:
    """Inventory of a model, by one walk.

    Args:
        model: any `torch.nn.Module`; meta tensors and wrapped models will do.
    """
    walked = walk.take(model)
    return Inventory(tuple(_slots(walked)), walked)


@functools.cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _role(slot: Slot, owned: bool, packed: bool) -> str:
    if slot.tensor.requires_grad and slot.kind == "parameter":
        return ADAPTER
    if owned:
        return PROJECTION
    return QUANTIZED if packed else BASE


def _entry(slots: list[Slot], packed: bool) -> TensorInfo:
    first, tensor = slots[0], slots[0].tensor
    # Nearly all tensors have one slot, and generators over it would take as long as all else.
    alone = len(slots) == 1
    owned = first.owned if alone else all(slot.owned for slot in slots)
    return TensorInfo(
        name=first.name,
        names=(first.name,) if alone else tuple(slot.name for slot in slots),
        kind=first.kind,
        role=_role(first, owned, packed),
        module=first.name.rpartition(".")[0],
        shape=tuple(tensor.shape),
        dtype=type(tensor.data).__name__ if _parts(tensor) else _name_of(tensor.dtype),
        nbytes=nbytes_of(tensor),
        trainable=bool(tensor.requires_grad),
        owned=owned,
        persistent=first.persistent if alone else any(slot.persistent for slot in slots),
    )
