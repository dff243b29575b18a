"""From one optimizer step to the next: averages after each backward pass, and what is refused before a step."""

from __future__ import annotations

import functools
import operator
import weakref
from collections import UserDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from trainer_fsdp_patch import casts
from trainer_fsdp_patch.errors import AdapterError
from trainer_fsdp_patch.inspecting import elementwise, inventory
from trainer_fsdp_patch.names import canonical
from trainer_fsdp_patch.planning.prepared import Prepared, held_by, prepared_for
from trainer_fsdp_patch.ranks import buckets, collectives
from trainer_fsdp_patch.saving import liveness
from trainer_fsdp_patch.training import gradients

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

Result = TypeVar("Result")

_TRAINABLE = operator.attrgetter("requires_grad")

_STEPS: weakref.WeakKeyDictionary[Prepared, Steps] = weakref.WeakKeyDictionary()


class Steps:
    """How a planned model is stepped.

    Args:
        averaging: averages its gradients.
        trained: identities of the tensors that were trainable at any time.

    Attributes:
        buckets: that its gradients are averaged in.
        optimizers: those that were looked at, with the number of their parameters, and of averages at their last step.
    """

    def __init__(self, averaging: gradients.Averaging, trained: set[int]) -> None:
        self.averaging, self.trained = averaging, trained
        self.buckets = buckets.Buckets()
        self.optimizers: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[int, int]] = weakref.WeakKeyDictionary()
        self._tensors: list[torch.Tensor] = []
        self._frozen: list[torch.Tensor] = []
        self._parameters: list[torch.Tensor] = []

    def parameters(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Those that were trainable at any time.

        Args:
            tensors: all that are replicated; another list where any has changed.
        """
        if tensors is not self._tensors or any(map(_TRAINABLE, self._frozen)):
            self.trained.update(id(tensor) for tensor in tensors if tensor.requires_grad)
            self._tensors, self._frozen, self._parameters = tensors, [], []
            for tensor in tensors:
                (self._parameters if id(tensor) in self.trained else self._frozen).append(tensor)
        return self._parameters


def watch(prepared: Prepared, accelerator: Accelerator) -> None:
    """Average from now on at the end of each backward pass, and before a step that finds something left.

    Args:
        prepared: of a model that accelerate is about to wrap.
        accelerator: whose flag says which passes synchronise.
    """
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    model = prepared.model()
    # Hooks are torch's and outlive the model, so they hold neither the record nor the tensors.
    record, owner = weakref.ref(prepared), weakref.ref(accelerator)
    prepared.belongs_to(accelerator)
    liveness.watch(prepared)

    def average() -> None:
        planned = record()
        if planned is not None:
            average_replicated(planned)

    trained = {id(tensor) for tensor in prepared.tensors if tensor.requires_grad}
    synchronises = functools.partial(gradients.synchronises, owner, prepared.model)
    _STEPS[prepared] = Steps(gradients.Averaging(prepared.tensors, average, synchronises), trained)
    model.register_forward_hook(watch_outputs)
    if accelerator.mixed_precision != "no":
        casts.watch(model)

    def before(optimizer: torch.optim.Optimizer, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        planned = record()
        if planned is not None:
            before_step(planned, optimizer)

    weakref.finalize(model, register_optimizer_step_pre_hook(before).remove)


def averaging_of(prepared: Prepared) -> gradients.Averaging | None:
    """What averages the gradients of a planned model, from `watch` on."""
    steps = _STEPS.get(prepared)
    return None if steps is None else steps.averaging


def average_replicated(prepared: Prepared) -> None:
    """Average the gradients of what is replicated and was trainable at any time, as DDP does.

    What is trainable right now may differ between ranks: peft's `disable_adapter()` freezes the adapter inside it.
    """
    steps = _STEPS[prepared]
    parameters = steps.parameters(prepared.tensors)
    see = liveness.of(prepared).note_gradients
    collectives.average_gradients(parameters, prepared.groups, steps.buckets, see)


def take_up(prepared: Prepared, later: dict[str, torch.Tensor]) -> None:
    """Average and compare adapters that came after the plan too from now on.

    Args:
        prepared: of a model that is trained again.
        later: from `Prepared.later`, with the same bits on all ranks.
    """
    prepared.add(later)
    liveness.watch(prepared)
    averaging = averaging_of(prepared)
    if averaging is not None:
        averaging.note(later.values())


def before_step(prepared: Prepared, optimizer: torch.optim.Optimizer) -> None:
    """Before an optimizer's step: average what no pass has averaged, and refuse what cannot be averaged.

    Args:
        prepared: of a planned model.
        optimizer: any of this process.

    Raises:
        AdapterError: it steps a parameter of the model that no plan knows, or shards otherwise than full tensors.
    """
    casts.forget()
    steps = _STEPS[prepared]
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    before, averages = steps.optimizers.get(optimizer, (-1, -1))
    if count != before:
        stepped = _stepped(optimizer)
        _refuse_unknown(prepared, stepped)
        if not prepared.shards().isdisjoint(map(id, stepped)):
            elementwise.refuse(optimizer, prepared.sharded_names[0], prepared.plan.fsdp_version)
    if steps.averaging.may_be_left(averages):
        ours = [parameter for parameter in _stepped(optimizer) if id(parameter) in steps.trained]
        if steps.averaging.is_left(ours):
            steps.averaging.finish()
    steps.optimizers[optimizer] = count, steps.averaging.averages
    liveness.of(prepared).note_step(optimizer)


def _stepped(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _refuse_unknown(prepared: Prepared, stepped: list[torch.Tensor]) -> None:
    others = {id(parameter) for parameter in stepped if parameter.requires_grad} - prepared.known
    for name, parameter in prepared.model().named_parameters() if others else ():
        owned = isinstance(parameter, inventory.dtensor()) or prepared.is_sharded(name)
        if id(parameter) in others and not owned:
            raise AdapterError(
                canonical(name),
                "became trainable after the model was prepared for FSDP, and the optimizer steps it",
                "No rank averages its gradient: each would train one of its own",
                "Add adapters before Trainer.train() is called, or start a new Trainer",
                tensor=canonical(name),
            )


def after_backward(upstream: Callable[[], Result], accelerator: Accelerator) -> Result:
    """Average the replicated gradients of every planned model after a backward pass of accelerate's.

    Args:
        upstream: the pass.
        accelerator: whose flag says whether it synchronises.
    """
    averaging = map(averaging_of, held_by(accelerator))
    return gradients.backward(upstream, accelerator, [item for item in averaging if item is not None])


def watch_outputs(module: nn.Module, args: tuple[object, ...], output: object) -> None:
    """Forward hook of a planned model. It is a function of a module, so that models with it can be pickled.

    Args:
        module: whose forward has run; a copy of the planned model has the hook and no record.
        args: of the forward.
        output: tensors, or a structure of them.
    """
    import torch
    from torch.utils import _pytree

    if getattr(torch.compiler, "is_compiling", lambda: False)():
        return
    casts.forget()
    if not torch.is_grad_enabled():
        return
    prepared = prepared_for(module)
    averaging = None if prepared is None or prepared.model() is not module else averaging_of(prepared)
    if averaging is None:
        return
    averaging.begin_forward()
    for item in _pytree.tree_leaves(output):
        unknown = isinstance(item, (dict, UserDict))
        for tensor in item.values() if unknown else (item,):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(averaging.begin)  # type: ignore[no-untyped-call]
                if unknown and hasattr(module, "unshard"):
                    tensor.register_hook(functools.partial(_gather_root, weakref.ref(module)))  # type: ignore[no-untyped-call]


def _gather_root(model: weakref.ref[Any], gradient: torch.Tensor) -> None:
    """Hook of outputs in a mapping that torch's pytrees do not know, such as a BatchEncoding.

    FSDP2 (`FSDPState._register_pre_backward_hook`) finds no tensor in it, and so does not gather what it has freed of
    the root after the forward. Before accelerate 1.15 it frees the root, and later where a user asks for it.

    Args:
        model: the root.
        gradient: of the output.
    """
    root = model()
    if root is not None:
        root.unshard()
