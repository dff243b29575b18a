"""When the gradients of a replicated adapter are averaged: at the end of a backward pass, whoever calls it.

As DDP does it, hooks see a pass begin and have autograd call back once it has ended. So `loss.backward()`, several
passes a step and a `.grad` that is read before the step all find averages. accelerate's flag says which passes
synchronise.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from trainer_fsdp_patch.measuring import footprint
from trainer_fsdp_patch.names import unwrap

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn
    from torch.autograd.graph import Node
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

Result = TypeVar("Result")

_FIRST: weakref.WeakKeyDictionary[nn.Module, tuple[type, Callable[[], nn.Module | FSDPParamGroup | None] | None]] = (
    weakref.WeakKeyDictionary()
)
"""Class of a model, and its first unit of FSDP, where it has one."""


HOOKS = 128
"""Parameters that notice when they get a gradient; of more, as many are spread over all.

Autograd takes a microsecond to call a hook. The model's outputs have hooks too, which see the usual pass.
"""


class Averaging:
    """Averages replicated gradients once for each backward pass that synchronises.

    Args:
        parameters: the replicated trainable ones.
        average: does it; all ranks call it alike.
        synchronises: whether the pass that ends now is one to average after.

    Attributes:
        averages: how many there were.
        sampled: whether some parameters have no hooks.
        pending: identities of parameters whose hooks have noticed gradients that are not averaged.
    """

    def __init__(
        self, parameters: Iterable[torch.Tensor], average: Callable[[], None], synchronises: Callable[[], bool]
    ) -> None:
        self.average, self.synchronises = average, synchronises
        self.deferred = self.sampled = False
        self.averages = 0
        self.pending: set[int] = set()
        self._queued = False
        self._reached: Node | None = None
        self.note(parameters)

    def note(self, parameters: Iterable[torch.Tensor]) -> None:
        """Notice when these get gradients, those of them that train, or as many as are worth a call in each pass."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.sampled = self.sampled or len(trained) > HOOKS
        for parameter in trained[:: -(-len(trained) // HOOKS) or 1]:
            # torch gives this method no types.
            parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]

    def begin_forward(self) -> None:
        """Forget a pass that an exception has ended before autograd could call back."""
        import torch

        # Minus one: no backward pass is running. In one, a checkpointed region computes its forward again.
        if torch._C._current_graph_task_id() == -1:
            self._queued, self._reached = False, None

    def begin(self, gradient: torch.Tensor) -> None:
        """Hook of the model's outputs: they are the first to be reached, outside of any checkpointed region.

        A checkpointed region runs a pass of its own within the pass, and its end would be too early.
        """
        import torch

        if self.deferred or self._queued:
            return
        self._reached = torch._C._current_autograd_node()
        self._queue()

    def _note(self, parameter: torch.Tensor) -> None:
        self.pending.add(id(parameter))
        if not self.deferred and not self._queued:
            self._queue()

    def _queue(self) -> None:
        import torch

        self._queued = True
        # DDP and FSDP end their passes by this private call too; autograd has no public one.
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        node, self._reached, self._queued = self._reached, None, False
        # A rank whose loss misses the adapter has to take part in what other ranks average. So none can begin before
        # its pass has ended: which gradient is the last one is not known before, and may differ between ranks.
        if (self.pending or (node is not None and _accumulates(node))) and self.synchronises():
            self.finish()

    def forget(self) -> None:
        """Forget a pass that an exception has ended, and what it has accumulated."""
        self._queued = self.deferred = False
        self._reached = None
        self.pending.clear()

    def finish(self) -> None:
        """Average now."""
        self.average()
        self.averages += 1
        self.pending.clear()

    def may_be_left(self, averages: int) -> bool:
        """Whether anything may be left to average before a step.

        Args:
            averages: how many there had been at the optimizer's last step; less than none where there was none.
        """
        # Where not all have hooks, there may be a pass that none of them has seen.
        return bool(self.pending) or (self.sampled and averages == self.averages)

    def is_left(self, parameters: Sequence[torch.Tensor]) -> bool:
        """Whether gradients of some of these may be left, where some may be.

        Args:
            parameters: replicated ones that an optimizer is about to step.
        """
        if not self.sampled:
            return not self.pending.isdisjoint(map(id, parameters))
        return bool(self.pending and parameters) or any(parameter.grad is not None for parameter in parameters)


def _accumulates(node: Node) -> bool:
    """Whether the pass that ends now is a `backward()`, which accumulates in every leaf, and no `autograd.grad()`.

    Args:
        node: of the graph, which the pass has run. Some leaf lies below it.
    """
    import torch

    seen: set[Node] = set()
    waiting: list[Node | None] = [node]
    while waiting:
        below = waiting.pop()
        if below is None or below in seen:
            continue
        seen.add(below)
        if type(below).__name__ == "AccumulateGrad":
            try:
                return bool(torch._C._will_engine_execute_node(below))
            except RuntimeError:
                # It is an input of `autograd.grad()`; autograd does not answer for those.
                return False
        waiting.extend(following for following, _ in below.next_functions)
    return False


def backward(upstream: Callable[[], Result], accelerator: Accelerator, averaging: Iterable[Averaging]) -> Result:
    """Around `Accelerator.backward`, which all ranks call alike: all models are averaged in one order after it.

    So a rank whose loss reaches none of an adapter still takes part.

    Args:
        upstream: to be called without arguments.
        accelerator: whose flag says whether this pass synchronises.
        averaging: of each planned model that it holds.
    """
    models = list(averaging)
    for item in models:
        item.deferred = True
    try:
        result = upstream()
    finally:
        for item in models:
            item.deferred = False
    if accelerator.sync_gradients:
        for item in models:
            item.finish()
    return result


def synchronises(accelerator: Callable[[], Accelerator | None], model: Callable[[], nn.Module | None]) -> bool:
    """Whether a pass that ends now is averaged: accelerate's flag, and FSDP's own where its `no_sync()` is used alone.

    Args:
        accelerator: returns the run's, or None where it is gone.
        model: returns the planned one, unwrapped.
    """
    owner, planned = accelerator(), model()
    if owner is None or planned is None:
        return True
    if not owner.sync_gradients:
        return False
    wrapped = next((item for item in owner._models if unwrap(item) is planned), planned)
    return _flags(wrapped)


def _flags(model: nn.Module) -> bool:
    """FSDP's flag of the first unit that has one, else True; `no_sync()` sets those of all."""
    kind, first = _FIRST.get(model, (None, None))
    unit = None if first is None else first()
    # FSDP2 gives a model that it takes another class. A base that transformers has sharded has no unit at all.
    if kind is not type(model) or (first is not None and unit is None):
        unit = _first_unit(model)
        _FIRST[model] = type(model), None if unit is None else weakref.ref(unit)
    return bool(getattr(unit, "_sync_gradients", True)) and bool(getattr(unit, "reduce_grads", True))


def _first_unit(model: nn.Module) -> nn.Module | FSDPParamGroup | None:
    for module in model.modules():
        if "_sync_gradients" in vars(module):
            return module
        for group in footprint.groups(module):
            return group
    return None
