"""A model whose plan is applied: its tensors outside FSDP, and what later steps need to know of them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch import inventory, sync, units
from trainer_fsdp_patch.errors import AdapterError, message
from trainer_fsdp_patch.liveness import Liveness
from trainer_fsdp_patch.shadowing import shadowed

if TYPE_CHECKING:
    from trainer_fsdp_patch.planning import Plan

_PREPARED: weakref.WeakKeyDictionary[Any, Prepared] = weakref.WeakKeyDictionary()


class Prepared:
    """A model whose plan is applied.

    Attributes:
        plan: the plan.
        names: canonical names of the tensors set aside; tensors: the tensors, in the same order.
        sharded: canonical names of the trainable tensors that FSDP shards, whose gradients it averages itself.
        groups: data-parallel process groups that gradients are averaged over.
        native: whether transformers sharded the base while it loaded it, and accelerate knows of no FSDP.
        liveness: whether training moves it, from `watch` on.
        loading: whether a Trainer is reading a checkpoint; failure: why this rank refused it, or ""; read: what it has
            read of sharded tensors.
        counted: a step's count of items over all ranks, and the share of one.
    """

    def __init__(self, model: Any, plan: Plan, groups: Sequence[Any], *, native: bool = False) -> None:
        self.model: Callable[[], Any] = weakref.ref(model)
        self.plan, self.groups, self.native = plan, groups, native
        self.roles = {item.tensor.name: item.tensor.role for item in plan.set_aside}
        self.sharded = [item.tensor.name for item in plan.sharded]
        self.expected: dict[str, set[str]] = {}
        self.loading, self.failure = False, ""
        self.read: dict[str, Any] = {}
        self.liveness: Liveness | None = None
        self.counted: tuple[Any, float] = (None, 0.0)
        self._pending: set[int] = set()
        self.refresh()

    def refresh(self) -> None:
        """Look the tensors up again, after moves that may have replaced objects."""
        slots = {
            name: tensor for name, _, _, _, tensor, _ in inventory.named_tensors(self.model()) if name in self.roles
        }
        self.names, self.tensors = list(slots), list(slots.values())
        self._known = {id(tensor) for tensor in self.tensors}

    def of_adapter(self) -> dict[str, Any]:
        """What the adapter owns, trainable or not, by canonical name."""
        adapter = (inventory.ADAPTER, inventory.PROJECTION)
        return {
            name: tensor for name, tensor in zip(self.names, self.tensors, strict=True) if self.roles[name] in adapter
        }

    def average_gradients(self) -> None:
        """Average the gradients of what is replicated and trainable now.

        Raises:
            AdapterError: a parameter became trainable that the plan does not know.
        """
        model = self.model()
        for name, parameter in model.named_parameters() if model is not None else ():
            if parameter.requires_grad and id(parameter) not in self._known and not self._is_sharded(name):
                raise AdapterError(
                    message(
                        inventory.canonical(name),
                        "became trainable after the model was prepared for FSDP",
                        "No rank averages its gradient and no optimizer steps it",
                        "Add adapters before Trainer.train() is called, or start a new Trainer",
                    ),
                    tensor=inventory.canonical(name),
                )
        sync.average_gradients([tensor for tensor in self.tensors if tensor.requires_grad], self.groups)
        self._pending.clear()
        if self.liveness is not None:
            self.liveness.note_gradients()

    def _is_sharded(self, name: str) -> bool:
        """Whether FSDP has a parameter; FSDP1 may show it as a flat one of its unit."""
        name = inventory.canonical(name)
        return name in self.sharded or (bool(self.sharded) and name.endswith("_flat_param"))

    def watch(self) -> None:
        """Refuse optimizer steps with gradients that no average has seen.

        A training loop that calls `loss.backward()` instead of `Accelerator.backward` would otherwise
        train an adapter of its own on each rank.
        """
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        # The hooks outlive neither the model nor keep it alive, so they hold these two and not self.
        known, pending = self._known, self._pending
        self.liveness = liveness = Liveness([tensor for tensor in self.tensors if tensor.requires_grad])

        def note(parameter: Any) -> None:
            pending.add(id(parameter))

        def refuse(optimizer: Any, args: Any, kwargs: Any) -> None:
            stepped = {id(item) for group in optimizer.param_groups for item in group["params"]} if pending else set()
            if not stepped.isdisjoint(known & pending):
                raise AdapterError(
                    message(
                        "optimizer.step",
                        "the adapter has gradients that were not averaged over the ranks",
                        "Each rank would train an adapter of its own",
                        "Call Accelerator.backward(loss), as Trainer.training_step does, and not loss.backward()",
                    )
                )
            liveness.note_step(optimizer)

        for tensor in self.tensors:
            if tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(note)
        weakref.finalize(self.model(), register_optimizer_step_pre_hook(refuse).remove)


def prepared_for(model: Any) -> Prepared | None:
    """Record of a model, wrapped or not, if a plan was applied to it."""
    return _PREPARED.get(inventory.bare(model))


def prepared_by(trainer: Any) -> Prepared | None:
    """Record of a Trainer's model, if a plan was applied to it."""
    return None if trainer.model is None else prepared_for(trainer.model)


def any_prepared() -> bool:
    """Whether this process has a model that a plan was applied to."""
    return bool(_PREPARED)


def keep(model: Any, prepared: Prepared) -> None:
    """Remember the record for as long as the model lives."""
    _PREPARED[model] = prepared


def in_order(parameters: Iterable[Any]) -> list[Any]:
    """The same parameters, those that plans replicate first and as the plans have them.

    A sum in another order ends in other last bits; ranks that clip by them drift apart.
    """
    replicated = [tensor for prepared in _PREPARED.values() for tensor in prepared.tensors]
    places = {id(tensor): place for place, tensor in enumerate(replicated)}
    return sorted(parameters, key=lambda parameter: places.get(id(parameter), len(places)))


def average_gradients(accelerator: Any) -> None:
    """Average the replicated gradients of every planned model that the accelerator holds.

    Raises:
        AdapterError: a parameter became trainable that no plan knows.
    """
    for model in accelerator._models:
        prepared = prepared_for(model)
        if prepared is not None:
            prepared.average_gradients()


@contextlib.contextmanager
def set_aside(model: Any) -> Iterator[None]:
    """Hide what is not FSDP's while FSDP2 takes a model, then put the same objects back.

    Hidden tensors are neither sharded nor moved to meta nor asked to be DTensors, on any torch.
    """
    prepared = prepared_for(model)
    if prepared is None:
        yield
        return
    known = {id(tensor) for tensor in prepared.tensors}
    hidden = []
    for _, kind, key, module, tensor, _ in list(inventory.named_tensors(model)):
        if id(tensor) in known:
            slots = module._parameters if kind == "parameter" else module._buffers
            hidden.append((slots, key, tensor))
            slots[key] = None
    try:
        with units.chosen(model):
            yield
    finally:
        for slots, key, tensor in hidden:
            slots[key] = tensor


@contextlib.contextmanager
def keep_dtype(model: Any) -> Iterator[None]:
    """Ignore casts of a planned model: what is frozen keeps its dtype, and packed weights their bytes.

    https://github.com/huggingface/accelerate/pull/3848
    """
    import torch

    if prepared_for(model) is None:
        yield
        return
    upstream = model.to

    def to(target: Any) -> Any:
        return model if isinstance(target, torch.dtype) else upstream(target)

    with shadowed(model, to=to):
        yield
