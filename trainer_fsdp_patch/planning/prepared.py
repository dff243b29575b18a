"""A model whose plan is applied: its tensors outside FSDP, and what later steps need to know of them."""

from __future__ import annotations

import contextlib
import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch import sync
from trainer_fsdp_patch.errors import AdapterError, message
from trainer_fsdp_patch.names import canonical, unwrap
from trainer_fsdp_patch.planning import elementwise, inventory
from trainer_fsdp_patch.preparing import units
from trainer_fsdp_patch.shadowing import shadowed
from trainer_fsdp_patch.training import gradients
from trainer_fsdp_patch.training.liveness import Liveness

if TYPE_CHECKING:
    from trainer_fsdp_patch.planning.planning import Plan

_PREPARED: weakref.WeakKeyDictionary[Any, Prepared] = weakref.WeakKeyDictionary()
_PARTS: weakref.WeakKeyDictionary[Any, Callable[[], Any]] = weakref.WeakKeyDictionary()


def _nobody() -> None:
    """In place of a weak reference, before there is one."""


class Prepared:
    """A model whose plan is applied.

    Attributes:
        plan: the plan.
        names: canonical names of the tensors set aside; tensors: the tensors, in the same order.
        sharded: canonical names of the trainable tensors that FSDP shards, whose gradients it averages itself.
        cast: dtype that a user, or the Trainer, has cast these to since, or None.
        groups: data-parallel process groups that gradients are averaged over.
        native: whether transformers sharded the base while it loaded it, and accelerate knows of no FSDP.
        accelerator: gives the one that prepares the model, from `watch` on, as long as it lives.
        liveness, averaging: whether training moves it, and when gradients are averaged; from `watch` on.
        loading: whether a Trainer is reading a checkpoint; failure: why this rank refused it, or ""; read: what it has
            read of sharded tensors.
    """

    def __init__(self, model: Any, plan: Plan, groups: Sequence[Any], *, native: bool = False) -> None:
        self.model: Callable[[], Any] = weakref.ref(model)
        self.plan, self.groups, self.native = plan, groups, native
        self.roles = {item.tensor.name: item.tensor.role for item in plan.set_aside}
        self.sharded = [item.tensor.name for item in plan.sharded]
        self.cast: Any = None
        self.expected: dict[str, set[str]] = {}
        self.loading, self.failure = False, ""
        self.read: dict[str, Any] = {}
        self.liveness: Liveness | None = None
        self.averaging: gradients.Averaging | None = None
        self.accelerator: Callable[[], Any] = _nobody
        self._optimizers: set[tuple[int, int]] = set()
        self._trained: set[int] = set()
        self.refresh()

    def wrapped(self) -> Any:
        """The model as its accelerator holds it, in FSDP1's root; the bare one where it holds none."""
        owner, model = self.accelerator(), self.model()
        return next((item for item in getattr(owner, "_models", ()) if unwrap(item) is model), model)

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
        """Average the gradients of what is replicated and was trainable at any time, as DDP does.

        What is trainable right now may differ between ranks: peft's `disable_adapter()` freezes the adapter inside it.
        """
        self._trained.update(id(tensor) for tensor in self.tensors if tensor.requires_grad)
        sync.average_gradients([tensor for tensor in self.tensors if id(tensor) in self._trained], self.groups)
        if self.liveness is not None:
            self.liveness.note_gradients()

    def later(self) -> dict[str, Any]:
        """Tensors of adapters that came after the plan, by canonical name; FSDP has none of them."""
        found: dict[int, tuple[str, Any]] = {}
        for name, _, _, _, tensor, owned in inventory.named_tensors(self.model()):
            # FSDP1 keeps the flat parameter of its root in the PeftModel itself.
            flat = getattr(tensor, "_is_flat_param", False)
            sharded = flat or isinstance(tensor, inventory.dtensor()) or self._is_sharded(name)
            if owned and not sharded and id(tensor) not in self._known:
                found.setdefault(id(tensor), (name, tensor))
        return dict(found.values())

    def take_up(self, later: dict[str, Any]) -> None:
        """Average and compare these too from now on.

        Args:
            later: from `later`, with the same bits on all ranks.
        """
        for name, tensor in later.items():
            self.roles[name] = inventory.ADAPTER if tensor.requires_grad else inventory.PROJECTION
        self.refresh()
        self.liveness = Liveness([tensor for tensor in self.tensors if tensor.requires_grad])
        if self.averaging is not None:
            self.averaging.note(later.values())

    def _shards(self) -> set[int]:
        """Trainable parameters of which this rank has a part, by identity."""
        named = self.model().named_parameters() if self.sharded else ()
        return {id(parameter) for name, parameter in named if self._is_sharded(name)}

    def _is_sharded(self, name: str) -> bool:
        """Whether FSDP has a parameter; FSDP1 may show it as a flat one of its unit."""
        name = canonical(name)
        return name in self.sharded or (bool(self.sharded) and name.endswith("_flat_param"))

    def watch(self, accelerator: Any) -> None:
        """Average from now on at the end of each backward pass, and before a step that finds something left.

        Args:
            accelerator: whose flag says which passes synchronise.
        """
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        model = self.model()
        record, owner = weakref.ref(self), weakref.ref(accelerator)
        self.accelerator = owner
        trained = [tensor for tensor in self.tensors if tensor.requires_grad]
        self._trained = set(map(id, trained))
        self.liveness = Liveness(trained)
        self.averaging = gradients.Averaging(
            self.tensors, self.average_gradients, functools.partial(gradients.synchronises, owner, self.model)
        )
        model.register_forward_hook(gradients.watch_outputs)

        def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            # The hook is torch's and outlives the model, so it holds neither the record nor the tensors.
            prepared = record()
            if prepared is not None:
                prepared.before_step(optimizer)

        weakref.finalize(model, register_optimizer_step_pre_hook(before_step).remove)

    def before_step(self, optimizer: Any) -> None:
        """Before an optimizer's step: average what no pass has averaged, and refuse what cannot be averaged.

        Args:
            optimizer: any of this process.

        Raises:
            AdapterError: it steps a parameter of the model that no plan knows.
        """
        assert self.liveness is not None
        assert self.averaging is not None
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if (id(optimizer), len(stepped)) not in self._optimizers:
            self._refuse_unknown(stepped)
            if not self._shards().isdisjoint(map(id, stepped)):
                elementwise.refuse(optimizer, self.sharded[0], self.plan.fsdp_version)
            self._optimizers.add((id(optimizer), len(stepped)))
        if self.averaging.pending and not self.averaging.pending.isdisjoint(map(id, stepped)):
            self.averaging.finish()
        self.liveness.note_step(optimizer)

    def _refuse_unknown(self, stepped: list[Any]) -> None:
        others = {id(parameter) for parameter in stepped if parameter.requires_grad} - self._known
        for name, parameter in self.model().named_parameters() if others else ():
            owned = isinstance(parameter, inventory.dtensor()) or self._is_sharded(name)
            if id(parameter) in others and not owned:
                raise AdapterError(
                    message(
                        canonical(name),
                        "became trainable after the model was prepared for FSDP, and the optimizer steps it",
                        "No rank averages its gradient: each would train one of its own",
                        "Add adapters before Trainer.train() is called, or start a new Trainer",
                    ),
                    tensor=canonical(name),
                )


def prepared_for(model: Any) -> Prepared | None:
    """Record of a model, wrapped or not, if a plan was applied to it; None for whatever is no module."""
    # Asked first: runs that are not ours pay for no more than this, and import nothing.
    if not _PREPARED or not inventory.is_module(model):
        return None
    return _PREPARED.get(unwrap(model))


def prepared_with(module: Any) -> Prepared | None:
    """Record of the planned model that a module is, or is inside of; each module is looked for once a plan."""
    found = prepared_for(module)
    if found is not None or not _PREPARED or not inventory.is_module(module):
        return found
    if module not in _PARTS:
        models = [(item, item.model()) for item in _PREPARED.values()]
        owner = next((item for item, model in models if any(part is module for part in model.modules())), None)
        _PARTS[module] = _nobody if owner is None else weakref.ref(owner)
    part: Prepared | None = _PARTS[module]()
    return part


def prepared_by(trainer: Any) -> Prepared | None:
    """Record of a Trainer's model, if a plan was applied to it."""
    return prepared_for(getattr(trainer, "model", None))


def any_prepared() -> bool:
    """Whether this process has a model that a plan was applied to."""
    return bool(_PREPARED)


none_prepared: Callable[[], bool] = functools.partial(operator.not_, _PREPARED)
"""Whether it has none; next to nothing to call, since every step of runs that are not ours asks it."""


def keep(model: Any, prepared: Prepared) -> None:
    """Remember the record for as long as the model lives."""
    _PREPARED[model] = prepared
    _PARTS.clear()


def in_order(parameters: Iterable[Any]) -> list[Any]:
    """The same parameters, those that plans replicate first and as the plans have them.

    A sum in another order ends in other last bits; ranks that clip by them drift apart.
    """
    replicated = [tensor for prepared in _PREPARED.values() for tensor in prepared.tensors]
    places = {id(tensor): place for place, tensor in enumerate(replicated)}
    return sorted(parameters, key=lambda parameter: places.get(id(parameter), len(places)))


def held_by(accelerator: Any) -> list[Prepared]:
    """Records of the planned models that an accelerator holds, each once."""
    found = {id(item): item for item in map(prepared_for, accelerator._models) if item is not None}
    return list(found.values())


def backward(upstream: Callable[[], Any], accelerator: Any) -> Any:
    """Average the replicated gradients of every planned model after a backward pass of accelerate's.

    Args:
        upstream: the pass.
        accelerator: whose flag says whether it synchronises.
    """
    return gradients.backward(
        upstream, accelerator, [item.averaging for item in held_by(accelerator) if item.averaging]
    )


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
