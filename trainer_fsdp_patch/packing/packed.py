"""A quantized layer whose bytes are one frozen parameter: shown while FSDP has its unit gathered, else stood in for."""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from trainer_fsdp_patch.errors import AdapterError
from trainer_fsdp_patch.inspecting import blanks, inventory
from trainer_fsdp_patch.inspecting.leaves import Leaf, Place, leaves, raw, span
from trainer_fsdp_patch.names import PACKED
from trainer_fsdp_patch.packing.layout import Range, View, layout
from trainer_fsdp_patch.packing.stand_in import is_stand_in, name_of, stand_in, tell

if TYPE_CHECKING:
    import torch
    from torch import nn


def _references(values: list[Any], index: int) -> int:
    """References to an entry of a list, with those of this call."""
    return sys.getrefcount(values[index])


_ALONE = _references([object()], 0)
"""Of an entry that nobody else refers to; it depends on the release of Python."""


class Held(NamedTuple):
    """A tensor that the quantizer knows, and what stands for it.

    Attributes:
        view: its place in the layer's bytes.
        tensor: the quantizer's own object where that is more than a tensor, such as a parameter; else None.
        stand_in: what is in its places between the unit's forwards.
    """

    view: View
    tensor: torch.Tensor | None
    stand_in: torch.Tensor


class Packed:
    """Record of a layer, which lives as long as the layer.

    Attributes:
        name: canonical name of the layer.
        shown: whether the layer holds its own tensors now.
        moved: slots of the module that FSDP would have seen, by key: "parameter" or "buffer".
        shadows: methods of its class that the layer does not answer with.
    """

    def __init__(self, layer: nn.Module, name: str, shared: Collection[Range]) -> None:
        from torch._compile import _disable_dynamo

        # Dynamo goes through the hooks of FSDP1, and would read the attributes of stand-ins to guard them.
        self.show: Callable[[torch.Tensor], None] = _disable_dynamo(functools.partial(self._show))
        self.hide: Callable[[], None] = _disable_dynamo(functools.partial(self._hide))
        self._layer = weakref.ref(layer)
        self.name, self.shown = name, False
        self.moved: dict[str, str] = {}
        self.shadows: list[str] = []
        self.nbytes, by_tensor = layout(layer, shared)
        found = [leaf for leaf in leaves(layer) if id(leaf.tensor) in by_tensor]
        first = {id(leaf.tensor): leaf for leaf in reversed(found)}
        number = {tensor: index for index, tensor in enumerate(first)}
        self._places = [(number[id(leaf.tensor)], leaf.place) for leaf in found]
        self._values = [leaf.tensor for leaf in first.values()]
        self._held = [self._holding(leaf, by_tensor[tensor]) for tensor, leaf in first.items()]
        self._views: list[torch.Tensor] = []
        self._storage: object = None
        self._shown_from: torch.Tensor | None = None
        self._searches = 2

    def _holding(self, leaf: Leaf, view: View) -> Held:
        import torch

        own = leaf.tensor if type(leaf.tensor) is not torch.Tensor or vars(leaf.tensor) else None
        if own is not None and own.is_meta:
            # The `data` of a tensor on meta takes none of another device.
            own = blanks.of_class(own, torch.empty(0, dtype=own.dtype))
        return Held(view, own, stand_in(leaf.tensor, f"{self.name}.{leaf.path}"))

    @property
    def layer(self) -> nn.Module:
        """The layer."""
        layer = self._layer()
        assert layer is not None
        return layer

    def fill(self, stored: torch.Tensor) -> None:
        """Copy the layer's bytes.

        Args:
            stored: uint8, of `nbytes`, on the device of the layer or on meta.
        """
        done: set[tuple[int, int, int]] = set()
        for value, held in zip(self._values, self._held, strict=True):
            storage, start, end = span(value)
            if value.is_meta or stored.is_meta or (storage, start, end) in done:
                continue
            done.add((storage, start, end))
            stored[held.view.start : held.view.start + end - start].copy_(raw(value))

    def take_over(self) -> None:
        """Take the quantizer's tensors out of the slots that FSDP reads, and show them no more."""
        layer = self.layer
        for key, parameter in list(layer._parameters.items()):
            # What is made of tensors moves as what it is. Its parts are what is packed.
            inside = parameter is not None and inventory.inner_names(parameter)
            if inside and any(place.holder is parameter for _, place in self._places):
                self._leave(key, "parameter", parameter)
        self.shown = True
        self.hide()

    def _leave(self, key: str, kind: str, value: object) -> None:
        slots: dict[str, Any] = self.layer._parameters if kind == "parameter" else self.layer._buffers
        self.moved[key] = kind
        del slots[key]
        # A plain attribute of the same name answers in its place.
        vars(self.layer)[key] = value

    def _moved_place(self, place: Place) -> Place:
        slots = (self.layer._parameters, self.layer._buffers)
        return Place(vars(self.layer), place.key) if any(place.holder is item for item in slots) else place

    def _show(self, stored: torch.Tensor) -> None:
        """Give the layer its tensors, as views of bytes that are gathered.

        Args:
            stored: uint8, of at least `nbytes`.

        Raises:
            AdapterError: they are fewer, for they were cast.
        """
        if stored.numel() < self.nbytes:
            self._refuse_other(stored.numel())
        storage = (stored.untyped_storage()._cdata, stored.storage_offset(), stored.device)
        if storage != self._storage:
            views = [held.view.of(stored) for held in self._held]
            # A copy would be stale after the next gathering: it is made again each time.
            apart = any(view.untyped_storage()._cdata != storage[0] for view in views)
            self._storage = None if apart else storage
            self._views = views
            for held in self._held:
                tell(held.stand_in, stored.device)
        self._values = [self._value(held, view) for held, view in zip(self._held, self._views, strict=True)]
        for index, place in self._places:
            place.put(self._values[index])
        self.shown, self._shown_from = True, stored

    def _refuse_other(self, count: int) -> NoReturn:
        raise AdapterError(
            self.name,
            f"FSDP has gathered {count} of its {self.nbytes} quantized bytes",
            "They were cast to another dtype, and are other weights",
            "Leave param_dtype as it was when the Trainer prepared the model",
            tensor=self.name,
        )

    def _refuse_rewritten(self, held: Held) -> NoReturn:
        raise AdapterError(
            name_of(held.stand_in),
            "the layer has given it other memory in a forward",
            "What it has computed there is not sharded, and the next forward would use the bytes of before",
            'Keep such layers full: TRAINER_FSDP_PATCH_DISABLE="torch_v2_2_packed_units,torch_v2_6_packed_groups"',
            tensor=self.name,
        )

    @staticmethod
    def _value(held: Held, view: torch.Tensor) -> torch.Tensor:
        if held.tensor is None:
            return view
        held.tensor.data = view
        return held.tensor

    def _hide(self) -> None:
        """Put stand-ins in the places of the layer's tensors, before FSDP frees their memory.

        Quantizers move tensors from one attribute to another, as 8-bit layers do in their first forward. So all of the
        layer is searched the first times, and whenever somebody holds a tensor in a place that is not known.
        """
        if not self.shown:
            return
        here = all(place.get() is self._values[index] for index, place in self._places)
        if self._searches or not here:
            self._search()
        else:
            for index, place in self._places:
                place.put(self._held[index].stand_in)
            if self._is_held_elsewhere():
                self._search()
        for index, held in enumerate(self._held):
            if held.tensor is not None:
                view = self._views[index] if self._views else held.tensor
                if held.tensor.data_ptr() != view.data_ptr() or held.tensor.shape != view.shape:
                    self._refuse_rewritten(held)
                # Who kept the parameter itself finds it empty, and not full of what lies there since.
                held.tensor.data = held.tensor.data.new_empty(0)
        self._values, self.shown, self._shown_from = [], False, None

    def _is_held_elsewhere(self) -> bool:
        # The list of views, or the record of the quantizer's own object, is one more reference.
        return any(_references(self._values, index) > _ALONE + 1 for index in range(len(self._values)))

    def _search(self) -> None:
        """Find every place that holds one of the tensors, or has come to hold another view of the same memory."""
        number = {id(value): index for index, value in enumerate(self._values)}
        number |= {id(held.stand_in): index for index, held in enumerate(self._held)}
        memory = [span(view) for view in self._views]
        found = []
        for leaf in list(leaves(self.layer)):
            index = number.get(id(leaf.tensor))
            # FSDP1 has the packed parameter, and the layer's bias, in the same storage. A layer that is a unit may have
            # the flat parameter itself.
            fsdps = leaf.path == PACKED or getattr(leaf.tensor, "_is_flat_param", False)
            if index is None and not fsdps and not is_stand_in(leaf.tensor):
                storage, start, end = span(leaf.tensor)
                if any(storage == other and start < last and first < end for other, first, last in memory):
                    index = self._adopt(leaf)
            if index is not None:
                place = self._out_of_slots(leaf)
                place.put(self._held[index].stand_in)
                found.append((index, place))
        self._places = found
        self._searches = max(0, self._searches - 1)

    def _adopt(self, leaf: Leaf) -> int | None:
        """Take a new object for one of the layer's tensors, as peft makes one of a weight that it moves to its device.

        Returns:
            Its number; None where it is another view, whose place gets a copy.
        """
        for index, (held, view) in enumerate(zip(self._held, self._views, strict=True)):
            if span(view) == span(leaf.tensor) and (view.shape, view.dtype) == (leaf.tensor.shape, leaf.tensor.dtype):
                self._held[index] = self._holding(leaf, held.view)
                return index
        leaf.place.put(leaf.tensor.detach().clone())
        return None

    def _out_of_slots(self, leaf: Leaf) -> Place:
        """The place of a tensor, which is no longer one that FSDP or a state dict reads."""
        for kind, slots in (("parameter", self.layer._parameters), ("buffer", self.layer._buffers)):
            if leaf.place.holder is slots:
                self._leave(leaf.place.key, kind, leaf.tensor)
        return self._moved_place(leaf.place)

    @contextlib.contextmanager
    def reading(self, stored: torch.Tensor) -> Iterator[None]:
        """The layer with its tensors in memory of the caller's, and afterwards as it was.

        Args:
            stored: uint8, of at least `nbytes`, on any device.
        """
        before = self._shown_from
        self.hide()
        self.show(stored)
        try:
            yield
        finally:
            self.hide()
            # The caller's memory goes with the caller.
            self._views, self._storage = [], None
            if before is not None:
                self.show(before)

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """The layer's slots as they were before it was packed, while it is shown."""
        layer = self.layer
        slots: dict[str, dict[str, Any]] = {"parameter": layer._parameters, "buffer": layer._buffers}
        back = {key: kind for key, kind in self.moved.items() if key in vars(layer)}
        own = layer._parameters.pop(PACKED, None)
        plain = {key: vars(layer).pop(key) for key in self.shadows if key in vars(layer)}
        for key, kind in back.items():
            slots[kind][key] = vars(layer).pop(key)
        try:
            yield
        finally:
            vars(layer).update(plain)
            for key, kind in back.items():
                vars(layer)[key] = slots[kind].pop(key)
            if own is not None:
                layer._parameters[PACKED] = own


_PACKED: weakref.WeakKeyDictionary[nn.Module, Packed] = weakref.WeakKeyDictionary()


def packed_of(layer: nn.Module) -> Packed | None:
    """Record of a layer whose bytes are packed, or None."""
    return _PACKED.get(layer) if _PACKED else None


def none_packed() -> bool:
    """Whether this process has no packed layer."""
    return not _PACKED


def packed_layers(model: nn.Module) -> list[Packed]:
    """Records of the packed layers of a model, in its order."""
    return [] if not _PACKED else [_PACKED[module] for module in model.modules() if module in _PACKED]


def pack(layer: nn.Module, name: str, dtype: torch.dtype, shared: Collection[Range], device: torch.device) -> None:
    """Move the bytes of a layer into a frozen parameter of it, named `names.PACKED`.

    Args:
        layer: a quantized one; nothing of it is trained.
        name: canonical name.
        dtype: floating, in which FSDP moves the bytes without a cast.
        shared: memory that other layers use too, from `layout.shared_ranges`.
        device: where the layer runs; its bytes may be in main memory, or on meta, and stay there for FSDP to move.
    """
    import torch

    record = Packed(layer, name, shared)
    # Small tensors are on each rank where a base's large ones are on one, or nowhere yet.
    here = max(record._values, key=lambda value: value.nbytes).device
    stored = torch.zeros(-(-record.nbytes // dtype.itemsize), dtype=dtype, device=here)
    record.fill(stored.view(torch.uint8))
    if blanks.bring(layer, device):
        record = Packed(layer, name, shared)
    record.take_over()
    layer.register_parameter(PACKED, torch.nn.Parameter(stored, requires_grad=False))
    _PACKED[layer] = record
    _shadow(layer, record)


_PLAIN = ("_apply", "_save_to_state_dict", "_load_from_state_dict", "state_dict", "load_state_dict")
"""Methods of a module by which quantizers reach for tensors that are sharded now."""


def _shadow(layer: nn.Module, record: Packed) -> None:
    """Let a packed layer move, save and load as any module does: what it has is the packed parameter."""
    from torch import nn

    for name in _PLAIN:
        if getattr(type(layer), name) is not getattr(nn.Module, name):
            vars(layer)[name] = functools.partial(getattr(nn.Module, name), layer)
            record.shadows.append(name)
    # bitsandbytes lays 4-bit weights out anew in evaluation on some CPUs, which shared bytes cannot be.
    if getattr(layer, "support_avx512bf16_for_cpu", False):
        vars(layer)["support_avx512bf16_for_cpu"] = False
