"""What stands for a tensor while its bytes are sharded: it tells what the tensor is, and refuses to be read.

FSDP frees the memory of a unit when it reshards it. A view of that memory would read whatever lies there since.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch.errors import AdapterError

if TYPE_CHECKING:
    import torch

_ASKED = frozenset(
    {
        "__bool__",
        "__len__",
        "device",
        "dim",
        "dtype",
        "element_size",
        "get_device",
        "grad",
        "grad_fn",
        "is_complex",
        "is_contiguous",
        "is_cpu",
        "is_cuda",
        "is_floating_point",
        "is_inference",
        "is_leaf",
        "is_meta",
        "is_quantized",
        "is_signed",
        "is_sparse",
        "itemsize",
        "layout",
        "names",
        "nbytes",
        "ndim",
        "numel",
        "requires_grad",
        "requires_grad_",
        "shape",
        "size",
        "storage_offset",
        "stride",
    }
)
"""What a tensor answers without its bytes, by name of the method or property."""


def stand_in(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """A tensor on meta of the same class, shape, strides and dtype, which says that it is on the tensor's device.

    Args:
        tensor: plain, or a parameter; what is written on it, such as bitsandbytes' `quant_state`, both share from now.
        name: full name, for the error.

    Returns:
        A tensor; whoever reads it gets an AdapterError.
    """
    import torch

    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    made: torch.Tensor = torch.Tensor._make_subclass(_class_for(type(tensor)), meta, False)
    # One dictionary for both: quantizers write on either, depending on which of the two they find.
    made.__dict__ = vars(tensor)
    _TOLD[id(made)] = name, tensor.device
    weakref.finalize(made, _TOLD.pop, id(made), None)
    return made


_TOLD: dict[int, tuple[str, torch.device]] = {}
"""Name and device of each stand-in that lives, by identity. Their own dictionaries are the quantizers'."""


def tell(stand_in: torch.Tensor, device: torch.device) -> None:
    """Have a stand-in say that it is on another device, where its layer has been moved."""
    _TOLD[id(stand_in)] = _TOLD[id(stand_in)][0], device


def name_of(stand_in: torch.Tensor) -> str:
    """The full name of what a stand-in stands for."""
    return _TOLD[id(stand_in)][0]


def is_stand_in(tensor: object) -> bool:
    """Whether a tensor is one of these."""
    return id(tensor) in _TOLD


@functools.cache
def _class_for(kind: type) -> Any:
    """A subclass of a class of tensors, so that quantizers know the stand-in as one of theirs."""
    body = {
        "__torch_function__": classmethod(_answer),
        "device": property(lambda self: _TOLD[id(self)][1]),
        "__repr__": lambda self, **_: f"<{_TOLD[id(self)][0]}: its bytes are sharded by FSDP>",
        "__reduce_ex__": lambda self, protocol: _refuse(self, "pickle"),
        "__deepcopy__": lambda self, memo: _refuse(self, "deepcopy"),
    }
    return types.new_class(f"Sharded{kind.__name__}", (kind,), exec_body=lambda space: space.update(body))


def _answer(
    kind: type,
    function: Callable[..., object],
    types: Sequence[type],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> object:
    """Torch asks this for each function that gets a stand-in."""
    import torch

    name = str(getattr(function, "__name__", function))
    # A property is asked for through the `__get__` of a descriptor, which carries the property's name.
    name = str(getattr(getattr(function, "__self__", None), "__name__", name)) if name == "__get__" else name
    if name in _ASKED:
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))
    inside = [*args, *(kwargs or {}).values()]
    inside += [part for item in inside if isinstance(item, (list, tuple)) for part in item]
    return _refuse(next((item for item in inside if is_stand_in(item)), None), name)


def _refuse(tensor: object, asked: str) -> object:
    name = _TOLD[id(tensor)][0] if is_stand_in(tensor) else "a quantized tensor"
    raise AdapterError(
        name,
        f"{asked} was called while FSDP has the layer sharded",
        "Its bytes are spread over the ranks, and no rank has all of them now",
        "Read it inside the layer's forward, in summon_full_params or from accelerator.get_state_dict, or keep the "
        'layers whole: TRAINER_FSDP_PATCH_DISABLE="torch_v2_2_packed_units,torch_v2_6_packed_groups"',
        tensor=name,
    )
