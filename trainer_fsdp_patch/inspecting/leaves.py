"""Every plain tensor that a layer keeps, wherever in its attributes it hangs, and the place that holds it.

Quantizers keep weights, scales and tables in parameters, buffers, attributes, state objects, dictionaries, and in
tensors that are made of tensors. No quantizer is known here by name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.names import PACKED

if TYPE_CHECKING:
    import torch
    from torch import nn

_PLAIN = ("builtins", "torch", "numpy", "collections", "functools", "types", "typing", "enum")
"""Packages whose objects keep no tensor of a layer; dictionaries, lists and tensors are looked into."""

_HOOKS = ("_hf_hook", "_old_forward", "_is_hf_initialized")
"""What accelerate writes on a layer that it moves; it refers to weights that it does not own."""


class Place(NamedTuple):
    """Where an object keeps a tensor.

    Attributes:
        holder: a dictionary, a list, or an object with an attribute.
        key: in it.
    """

    holder: Any
    key: Any

    def get(self) -> object:
        """What the place holds now, or None."""
        if isinstance(self.holder, dict):
            return self.holder.get(self.key)
        if isinstance(self.holder, list):
            return self.holder[self.key] if self.key < len(self.holder) else None
        return getattr(self.holder, self.key, None)

    def put(self, value: object) -> None:
        """Have the place hold a value."""
        if isinstance(self.holder, (dict, list)):
            self.holder[self.key] = value
        else:
            setattr(self.holder, self.key, value)


class Leaf(NamedTuple):
    """A plain tensor of a layer.

    Attributes:
        path: of attributes from the layer on, such as `weight.quant_state.absmax`.
        place: that holds it.
        tensor: any dtype, with a storage of its own or a part of one.
    """

    path: str
    place: Place
    tensor: torch.Tensor


def leaves(layer: nn.Module) -> Iterator[Leaf]:
    """Every place below a layer that holds a plain tensor; one tensor may be in several.

    Children are other layers. What tuples hold is left out: nothing can be put in its place.

    Args:
        layer: any module.
    """
    own = {key: value for key, value in vars(layer).items() if key not in _of_module() and key not in _HOOKS}
    seen = {id(layer)}
    for holder, keys in ((layer._parameters, None), (layer._buffers, None), (vars(layer), own)):
        yield from _within(holder, list(holder if keys is None else keys), "", seen)


@functools.cache
def _of_module() -> frozenset[str]:
    from torch import nn

    return frozenset(vars(nn.Module()))


def _within(holder: Any, keys: Iterable[Any], prefix: str, seen: set[int]) -> Iterator[Leaf]:
    """Leaves of the entries of a dictionary, a list or an object."""
    import torch

    for key in keys:
        place = Place(holder, key)
        value, path = place.get(), f"{prefix}.{key}".lstrip(".")
        inner = inventory.inner_names(value) if isinstance(value, torch.Tensor) else ()
        if isinstance(value, torch.Tensor) and not inner:
            yield Leaf(path, place, value)
        if id(value) in seen or not (isinstance(value, torch.Tensor) or _is_looked_into(value)):
            continue
        seen.add(id(value))
        if isinstance(value, (dict, list)):
            yield from _within(value, list(value) if isinstance(value, dict) else range(len(value)), path, seen)
            continue
        yield from _within(value, inner, path, seen)
        attributes = vars(value)
        yield from _within(attributes, [name for name in attributes if name not in inner], path, seen)


def _is_looked_into(value: object) -> bool:
    from torch import nn

    if isinstance(value, (dict, list)):
        return True
    if isinstance(value, (nn.Module, type)) or callable(value) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.partition(".")[0] not in _PLAIN


def span(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Identity of a tensor's storage, and the first and the last byte in it that the tensor covers, plus one.

    Args:
        tensor: plain; one on meta will do.
    """
    size = tensor.element_size()
    start = int(tensor.storage_offset()) * size
    reach = sum(int((count - 1) * step) for count, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.untyped_storage()._cdata), start, start + (reach + 1) * size if tensor.numel() else start


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes that a tensor covers, in place: uint8, one dimension.

    A copy or a broadcast of bytes keeps patterns that spell NaN, and knows every dtype.

    Args:
        tensor: plain, not on meta.
    """
    import torch

    _, start, end = span(tensor)
    made = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return made.set_(tensor.untyped_storage(), start, (end - start,), (1,))


def statistics(layers: Iterable[nn.Module]) -> int:
    """Bytes that some layers keep in other tensors than parameters, such as scales and tables; each storage once.

    Args:
        layers: quantized ones.
    """
    sizes: dict[tuple[int, int], int] = {}
    for layer in layers:
        # A stand-in is on meta, and what is on meta takes no memory. FSDP1 may keep a parameter as an attribute.
        real = [leaf for leaf in leaves(layer) if not leaf.tensor.is_meta and leaf.path != PACKED]
        holders = {id(layer._parameters), *map(id, layer._parameters.values())}
        held = {span(leaf.tensor)[:2] for leaf in real if id(leaf.place.holder) in holders}
        for storage, start, end in (span(leaf.tensor) for leaf in real):
            if (storage, start) not in held:
                sizes[storage, start] = max(end - start, sizes.get((storage, start), 0))
    return sum(sizes.values())
