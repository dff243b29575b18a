"""What must not be a unit of FSDP: policies go by size or by class, and see neither what is shared nor who reads it."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

from trainer_fsdp_patch.errors import PlanError, message
from trainer_fsdp_patch.planning import inventory
from trainer_fsdp_patch.shadowing import shadowed


@contextlib.contextmanager
def chosen(model: Any) -> Iterator[None]:
    """Around accelerate's FSDP2 of a planned model: what cannot be a unit stays with the one around it.

    Args:
        model: planned; what is set aside is hidden already.

    Raises:
        PlanError: parameters are to be ignored on a torch before 2.7, which cannot.
    """
    from torch.distributed import fsdp

    upstream: Any = vars(fsdp)["fully_shard"]
    ignores = "ignored_params" in inspect.signature(upstream).parameters
    within, others = parts(model), _others(model)
    waiting: list[Any] = []

    def fully_shard(module: Any, **kwargs: Any) -> Any:
        if not ignores and kwargs.pop("ignored_params", None):
            _refuse_ignored()
        if module is model:
            return upstream(module, **kwargs)
        modules = list(module) if isinstance(module, (list, tuple)) else [module]
        if not all(_is_unit(item) and id(item) not in within for item in modules):
            return module
        if not _reaches_outside(modules, others):
            return upstream(module, **kwargs)
        # accelerate sees no ties through PEFT's wrappers: it asks for the embeddings, and for the head later.
        tied = [item for item in waiting if _is_unit(item) and not _nested(item, modules)]
        if tied and not _reaches_outside([*tied, *modules], others):
            upstream([*tied, *modules], **kwargs)
        else:
            waiting.extend(modules)
        return module

    with shadowed(fsdp, fully_shard=fully_shard), shadowed(model, **_ties(model)):
        yield


def _others(model: Any, ignored: Collection[int] = ()) -> dict[int, set[int]]:
    """For each module those that have a parameter of FSDP's, or a child that holds some, in common with it.

    What FSDP ignores does not decide where a unit ends: an adapter's projections, dictionaries and trainable tensors
    are shared by all layers, and each layer is a unit all the same.

    Args:
        model: before FSDP takes it.
        ignored: parameters that FSDP will not own, by identity; those that are hidden need not be named.

    Returns:
        Identities of modules by identity of a module: parameters come and go.
    """
    users: dict[int, set[int]] = {}
    owning = {id(module) for module in model.modules() if _owns(module, ignored)}
    for module in model.modules():
        parameters = [item for item in module._parameters.values() if item is not None and id(item) not in ignored]
        children = [item for item in module._modules.values() if id(item) in owning]
        for part in (*parameters, *children):
            users.setdefault(id(part), set()).add(id(module))
    others: dict[int, set[int]] = {}
    for together in users.values():
        if len(together) > 1:
            for module in together:
                others.setdefault(module, set()).update(together)
    return others


def _owns(module: Any, ignored: Collection[int]) -> bool:
    return any(id(parameter) not in ignored for parameter in module.parameters())


def barred(model: Any, ignored: Collection[int] = ()) -> Callable[[Any], bool]:
    """Which modules must not be units of their own, for a wrap policy of FSDP1.

    FSDP1 puts a unit in a module's place in one parent; another, as prompt learning is of embeddings, would miss it.

    Args:
        model: before it is wrapped.
        ignored: parameters that FSDP will not own, by identity.
    """
    parents = Counter(id(child) for module in model.modules() for child in module._modules.values())
    within = parts(model) | {child for child, count in parents.items() if count > 1}
    others = _others(model, ignored)
    return lambda module: id(module) in within or _reaches_outside([module], others)


def parts(model: Any) -> set[int]:
    """Modules that work as a part of a unit only, by identity.

    Adapters read what is below the layer that they adapt outside its forward, or hand on more than tensors around a
    whole block, in which FSDP finds nothing to hook; peft goes past the forward of its tuner, and transformers finds
    what a sub-model records by the name of its class, which FSDP2 changes.
    """
    from transformers import PreTrainedModel

    blocks = set(getattr(model, "_no_split_modules", None) or ())
    tuners = inventory.tuners(model)
    found = {id(item) for item in tuners}
    for module in model.modules():
        adapted = module not in tuners and inventory.is_adapted(module)
        inside = getattr(module, "base_layer", None)
        # Activation checkpointing has put its wrapper around the block by then.
        around = type(getattr(inside, "_checkpoint_wrapped_module", inside)).__name__ in blocks
        if isinstance(module, PreTrainedModel) or (adapted and around):
            found.add(id(module))
        elif adapted:
            found.update(id(item) for item in module.modules() if item is not module)
    return found


def _is_unit(module: Any) -> bool:
    """Whether torch takes a module: containers have no forward to gather before, and a unit's parts are taken."""
    from torch import nn

    if type(module).forward is nn.Module.forward:
        return False
    own = [item for child in _own(module) for item in child._parameters.values()]
    return not any(isinstance(item, inventory.dtensor()) for item in own)


def _own(module: Any) -> Iterator[Any]:
    """A module and those below it that are not in units of their own."""
    from torch.distributed.fsdp import FSDPModule

    pending = [module]
    while pending:
        item = pending.pop()
        yield item
        pending += [child for child in item.children() if not isinstance(child, FSDPModule)]


def _reaches_outside(modules: Any, others: dict[int, set[int]]) -> bool:
    """Whether something below some modules belongs to others too: two units cannot both have it."""
    inside = {id(part) for module in modules for part in module.modules()}
    return any(not others.get(part, inside) <= inside for part in inside)


def _nested(one: Any, others: list[Any]) -> bool:
    """Whether a module is inside one of the others, or has one of them inside."""
    below = {id(part) for part in one.modules()}
    return any(id(other) in below or any(part is one for part in other.modules()) for other in others)


def _ties(model: Any) -> dict[str, Callable[[], None]]:
    """A `tie_weights` that ties what was tied, wherever PEFT's wrappers have put it since.

    transformers finds tied weights by the names that the base had before.
    """
    slots: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for _, _, key, module, tensor, _ in inventory.named_tensors(model):
        if key in module._parameters:
            slots.setdefault(id(tensor), []).append((module._parameters, key))
    groups = [group for group in slots.values() if len(group) > 1]

    def tie_weights() -> None:
        for (first, name), *others in groups:
            for place, key in others:
                place[key] = first[name]

    return {"tie_weights": tie_weights}


def _refuse_ignored() -> None:
    text = message(
        "ignored_modules",
        "given for FSDP2 on a torch that cannot ignore parameters",
        "They would be sharded against your setting",
        "Use torch 2.7 or newer, or leave ignored_modules out",
    )
    raise PlanError(text, setting="ignored_modules")
