"""What must not be a unit of FSDP, since policies do not see who reads it, and the units that a forward begins in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from trainer_fsdp_patch.inspecting import tuning, walk
from trainer_fsdp_patch.names import without_checkpointing

if TYPE_CHECKING:
    from torch import nn


def others(model: nn.Module, ignored: Collection[int] = ()) -> dict[int, set[int]]:
    """For each module those that have a parameter of FSDP's, or a child that holds some, in common with it.

    What FSDP ignores does not decide where a unit ends. All layers share an adapter's projections, dictionaries and
    trainable tensors, and each layer is a unit all the same.

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
            for user in together:
                others.setdefault(user, set()).update(together)
    return others


def _owns(module: nn.Module, ignored: Collection[int]) -> bool:
    return any(id(parameter) not in ignored for parameter in module.parameters())


def cannot_be_unit(model: nn.Module, ignored: Collection[int] = ()) -> Callable[[nn.Module], bool]:
    """Which modules must not be units of their own, for a wrap policy of FSDP1.

    FSDP1 puts a unit in a module's place in one parent. Another would miss it, as prompt learning is one of embeddings.

    Args:
        model: before it is wrapped.
        ignored: parameters that FSDP will not own, by identity.
    """
    parents = Counter(id(child) for module in model.modules() for child in module._modules.values())
    within = parts(model) | {child for child, count in parents.items() if count > 1}
    shared = others(model, ignored)
    return lambda module: id(module) in within or reaches_outside([module], shared)


def has_nothing(model: nn.Module, ignored: Collection[int]) -> Callable[[nn.Module], bool]:
    """Which modules hold nothing for FSDP, for a wrap policy of FSDP1, which would make empty units of them.

    Args:
        model: before it is wrapped.
        ignored: parameters that FSDP will not own, by identity.
    """
    empty = {id(module) for module in model.modules() if not _owns(module, ignored)}
    return lambda module: id(module) in empty


def parts(model: nn.Module, walked: walk.Walk | None = None, among: Collection[nn.Module] = ()) -> set[int]:
    """Modules that work as a part of a unit only, by identity.

    Adapters read what is below the layer that they adapt outside its forward. Around a block they hand on more than
    tensors, in which FSDP finds nothing to hook. peft goes past the forward of its tuner. transformers finds what a
    sub-model records by the name of its class, which FSDP2 changes.

    Args:
        model: before FSDP takes it.
        walked: its modules, where they were walked already.
        among: those that are asked for; all where no walk is given.
    """
    from transformers import PreTrainedModel

    modules = tuning.by_class(model.modules()) if walked is None else walked.by_class
    tuners = tuning.tuners(modules)
    if walked is not None:
        modules = tuning.by_class({*among, *(above for item in among for above in walked.above(item))})
    whole = tuning.of_class(modules, lambda kind: issubclass(kind, PreTrainedModel))
    within = {id(item) for item in (*tuners, *whole)}
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in tuning.adapted(modules):
        if module not in tuners and not isinstance(module, PreTrainedModel):
            within.update([id(module)] if is_around(module, blocks) else map(id, walk.below(module)))
    return within


def is_around(module: nn.Module, blocks: Collection[str]) -> bool:
    """Whether an adapter is around a block of some classes, in wrappers of activation checkpointing or without."""
    return type(without_checkpointing(getattr(module, "base_layer", None))).__name__ in blocks


def reaches_outside(modules: Iterable[nn.Module], others: dict[int, set[int]]) -> bool:
    """Whether something below some modules belongs to others too: two units cannot both have it.

    Args:
        modules: that would be one unit.
        others: by identity of a module, what the function `others` gives.
    """
    inside = {id(part) for module in modules for part in module.modules()}
    return any(not others.get(part, inside) <= inside for part in inside)


def beginnings(walked: walk.Walk, layers: Collection[str], units: Mapping[str, Collection[str]]) -> set[str]:
    """Units that a forward begins in: those with embeddings, and layers that are alone of their class.

    Args:
        walked: modules of a model.
        layers: names of the modules that become units, the root aside.
        units: all names of the parameters of each unit, by its name.
    """
    from torch import nn

    known = dict(zip(walked.names, walked.modules, strict=True))
    kinds = Counter(type(known.get(name)) for name in layers)
    alone = {name for name in layers if kinds[type(known.get(name))] == 1}
    holders = {home: [known.get(name.rpartition(".")[0]) for name in names] for home, names in units.items()}
    tables = {home for home, modules in holders.items() if any(isinstance(module, nn.Embedding) for module in modules)}
    return alone.intersection(units) | tables
