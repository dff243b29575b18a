"""The user's own ignored modules: which parameters they are, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NoReturn

from trainer_fsdp_patch.errors import PlanError
from trainer_fsdp_patch.inspecting.inventory import Inventory
from trainer_fsdp_patch.names import canonical

if TYPE_CHECKING:
    from torch import nn


def names_of(model: nn.Module, ignored: str | Iterable[nn.Module] | None, inventory: Inventory) -> set[str]:
    """Canonical names of the parameters in the user's ignored modules.

    Args:
        model: before FSDP takes it.
        ignored: modules, a regular expression of their full names, or None.
        inventory: of the model.

    Raises:
        PlanError: an entry is no module of this model, or the expression is broken or matches nothing.
    """
    if ignored is None:
        return set()
    modules = {canonical(name): module for name, module in model.named_modules()}
    if isinstance(ignored, str):
        chosen = _matching(modules, ignored)
    else:
        chosen = modules_only(ignored)
        inside = {id(module) for module in modules.values()}
        strangers = [module for module in chosen if id(module) not in inside]
        if strangers:
            _refuse_ignored(f"{type(strangers[0]).__name__} is no module of the model that is trained")
    return inventory.names_of(parameter for module in chosen for parameter in module.parameters())


def _matching(modules: dict[str, nn.Module], text: str) -> list[nn.Module]:
    chosen = [module for name, module in modules.items() if expression(text).fullmatch(name)]
    if not chosen:
        _refuse_ignored(f"{text!r} matches the full name of no module")
    return chosen


def expression(text: str) -> re.Pattern[str]:
    """The user's regular expression of module names.

    Raises:
        PlanError: it is none.
    """
    try:
        return re.compile(text)
    except re.error as error:
        _refuse_ignored(f"{text!r} is no regular expression ({error})")


def modules_only(ignored: Iterable[nn.Module]) -> list[nn.Module]:
    """The user's ignored modules as a list.

    Raises:
        PlanError: an entry is something else than a module.
    """
    from torch import nn

    ignored = list(ignored)
    for entry in ignored:
        if not isinstance(entry, nn.Module):
            _refuse_ignored(f"{entry!r} is a {type(entry).__name__} and no module")
    return ignored


def _refuse_ignored(found: str) -> NoReturn:
    raise PlanError(
        "ignored_modules",
        found,
        "FSDP would shard what was to be ignored",
        "Give modules of the model after the adapter was added, or an expression of their full names",
        setting="ignored_modules",
    )
