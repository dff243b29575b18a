"""A model whose plan is applied: its tensors outside FSDP, and what later steps need to know of them."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.names import canonical, unwrap

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn
    from torch._C._distributed_c10d import ProcessGroup

    from trainer_fsdp_patch.planning.plan import Plan

_PREPARED: weakref.WeakKeyDictionary[nn.Module, Prepared] = weakref.WeakKeyDictionary()
_PARTS: weakref.WeakKeyDictionary[nn.Module, Callable[[], Prepared | None]] = weakref.WeakKeyDictionary()


def _nobody() -> None:
    """In place of a weak reference, before there is one."""


class Prepared:
    """A model whose plan is applied.

    Attributes:
        plan: the plan.
        names: canonical names of the ignored tensors; tensors: the tensors, in the same order.
        sharded_names: canonical names of the trainable tensors that FSDP shards, whose gradients it averages itself.
        known: identities of the tensors.
        cast: dtype that a user, or the Trainer, has cast these to since, or None.
        groups: data-parallel process groups that gradients are averaged over.
        native: whether transformers sharded the base while it loaded it, and accelerate knows of no FSDP.
        accelerator: gives the one that prepares the model, from `belongs_to` on, as long as it lives.
        announced: whether the log has said what the plan is.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        groups: Sequence[ProcessGroup | None],
        taken: inventory.Inventory,
        *,
        native: bool = False,
    ) -> None:
        self.model: Callable[[], Any] = weakref.ref(model)
        self.plan, self.groups, self.native = plan, groups, native
        self.roles = {item.tensor.name: item.tensor.role for item in plan.ignored}
        self.sharded_names = [item.tensor.name for item in plan.sharded]
        self.cast: torch.dtype | None = None
        self.announced = False
        self.accelerator: Callable[[], Accelerator | None] = _nobody
        self.hold(taken)

    def belongs_to(self, accelerator: Accelerator) -> None:
        """Remember which accelerator prepares the model."""
        self.accelerator = weakref.ref(accelerator)

    def cast_to(self, dtype: torch.dtype | None) -> None:
        """Remember that a user, or the Trainer, has cast the model."""
        self.cast = dtype

    def wrapped(self) -> Any:
        """The model as its accelerator holds it, in FSDP1's root; the unwrapped one where it holds none."""
        owner, model = self.accelerator(), self.model()
        return next((item for item in getattr(owner, "_models", ()) if unwrap(item) is model), model)

    def refresh(self) -> None:
        """Look the tensors up again, after moves that may have replaced objects, or where adapters have come."""
        self.hold(inventory.take(self.model()))

    def hold(self, taken: inventory.Inventory) -> None:
        """Hold the tensors that an inventory has in their slots."""
        tensors = {slot.name: slot.tensor for slot in taken.slots if slot.name in self.roles}
        self.names, self.tensors = list(tensors), list(tensors.values())
        self.known = {id(tensor) for tensor in self.tensors}

    def of_adapter(self) -> dict[str, torch.Tensor]:
        """What the adapter owns, trainable or not, by canonical name."""
        adapter = (inventory.ADAPTER, inventory.PROJECTION)
        return {
            name: tensor for name, tensor in zip(self.names, self.tensors, strict=True) if self.roles[name] in adapter
        }

    def add(self, later: dict[str, torch.Tensor]) -> None:
        """Take up tensors of adapters that came after the plan.

        Args:
            later: from `later`, with the same bits on all ranks.
        """
        for name, tensor in later.items():
            self.roles[name] = inventory.ADAPTER if tensor.requires_grad else inventory.PROJECTION
        self.refresh()

    def later(self) -> dict[str, torch.Tensor]:
        """Tensors of adapters that came after the plan, by canonical name; FSDP has none of them."""
        newcomers: dict[int, tuple[str, torch.Tensor]] = {}
        for slot in inventory.named_tensors(self.model()):
            # FSDP1 keeps the flat parameter of its root in the PeftModel itself.
            flat = getattr(slot.tensor, "_is_flat_param", False)
            sharded = flat or isinstance(slot.tensor, inventory.dtensor()) or self.is_sharded(slot.name)
            if slot.owned and not sharded and id(slot.tensor) not in self.known:
                newcomers.setdefault(id(slot.tensor), (slot.name, slot.tensor))
        return dict(newcomers.values())

    def shards(self) -> set[int]:
        """Trainable parameters that this rank has a part of, by identity."""
        named = self.model().named_parameters() if self.sharded_names else ()
        return {id(parameter) for name, parameter in named if self.is_sharded(name)}

    def is_sharded(self, name: str) -> bool:
        """Whether FSDP has a parameter; FSDP1 may show it as a flat one of its unit."""
        name = canonical(name)
        return name in self.sharded_names or (bool(self.sharded_names) and name.endswith("_flat_param"))


def prepared_for(model: object) -> Prepared | None:
    """Record of a model, wrapped or not, if a plan was applied to it; None for whatever is no module."""
    # Asked first: runs that are not ours pay for no more than this, and import nothing.
    if not _PREPARED or not inventory.is_module(model):
        return None
    return _PREPARED.get(unwrap(model))


def prepared_with(module: object) -> Prepared | None:
    """Record of the planned model that a module is, or is inside of. Each module is looked for once a plan."""
    own = prepared_for(module)
    if own is not None or not _PREPARED or not inventory.is_module(module):
        return own
    if module not in _PARTS:
        models = [(item, item.model()) for item in _PREPARED.values()]
        owner = next((item for item, model in models if any(part is module for part in model.modules())), None)
        _PARTS[module] = _nobody if owner is None else weakref.ref(owner)
    part: Prepared | None = _PARTS[module]()
    return part


def prepared_by(trainer: object) -> Prepared | None:
    """Record of a Trainer's model, if a plan was applied to it."""
    return prepared_for(getattr(trainer, "model", None))


def any_prepared() -> bool:
    """Whether this process has a model that a plan was applied to."""
    return bool(_PREPARED)


none_prepared: Callable[[], bool] = functools.partial(operator.not_, _PREPARED)
"""Whether it has none; next to nothing to call, since every step of runs that are not ours asks it."""


def keep(model: nn.Module, prepared: Prepared) -> None:
    """Remember the record for as long as the model lives.

    Args:
        model: unwrapped.
        prepared: its record.
    """
    _PREPARED[model] = prepared
    _PARTS.clear()


def in_order(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The same parameters, those that plans replicate first and as the plans have them.

    A sum in another order ends in other last bits; ranks that clip by them drift apart.

    Args:
        parameters: of any models.
    """
    replicated = [tensor for prepared in _PREPARED.values() for tensor in prepared.tensors]
    places = {id(tensor): place for place, tensor in enumerate(replicated)}
    return sorted(parameters, key=lambda parameter: places.get(id(parameter), len(places)))


def held_by(accelerator: Accelerator) -> list[Prepared]:
    """Records of the planned models that an accelerator holds, each once."""
    records = {id(item): item for item in map(prepared_for, accelerator._models) if item is not None}
    return list(records.values())
