"""Which modules are peft's: its models, tuners and layers. All of this goes by class."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from torch import nn


@functools.cache
def _containers() -> tuple[tuple[type, str], ...]:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import other

    # until peft 0.15: there is the second class alone
    auxiliary = getattr(other, "AuxiliaryTrainingWrapper", None) or other.ModulesToSaveWrapper
    return (
        (PeftModel, "base_model"),
        (BaseTuner, "model"),
        (BaseTunerLayer, "base_layer"),
        (auxiliary, "original_module"),
    )


Class = type
"""Any: mypy takes classes of modules for some that cannot be hashed."""
ByClass = dict[Class, list["nn.Module"]]


@functools.cache
def _child_of(kind: Class) -> str | None:
    """Where modules of a class keep the base, or None."""
    return next((child for container, child in _containers() if issubclass(kind, container)), None)


def base_child(module: nn.Module) -> str | None:
    """Child through which a PEFT container reaches the base model; all else in it is the adapter's."""
    base = _child_of(cast("type", type(module)))
    if base is not None and base not in module._modules:
        # X-LoRA keeps the tuner that it builds on where others keep the base.
        base = next((key for key, child in module._modules.items() if isinstance(child, _containers()[1][0])), base)
    return base


def by_class(modules: Iterable[nn.Module]) -> ByClass:
    """Modules of each class. A model has many modules, and few classes that have to be looked at.

    Args:
        modules: of a model.
    """
    found: ByClass = {}
    for module in modules:
        found.setdefault(type(module), []).append(module)
    return found


def of_class(modules: ByClass, wanted: Callable[[Class], bool]) -> list[nn.Module]:
    """Some of a model's modules.

    Args:
        modules: by class.
        wanted: whether those of a class are among them.
    """
    return [module for kind, members in modules.items() if wanted(kind) for module in members]


def tuners(modules: ByClass) -> set[nn.Module]:
    """PEFT's tuners in a model: what its models have as base_model, or stand around the base without one.

    Args:
        modules: of the model, all.
    """
    bases = (module._modules.get("base_model") for module in of_class(modules, _of_peft))
    found = of_class(modules, lambda kind: issubclass(kind, _containers()[1][0]))
    return {*found, *(base for base in bases if base is not None)}


def adapted(modules: ByClass) -> list[nn.Module]:
    """Those of PEFT's modules that work with a layer of the base. No model, wrapper or container is one.

    Args:
        modules: of a model, some or all.
    """
    return [module for module in of_class(modules, _may_adapt) if "base_model" not in module._modules]


def _of_peft(kind: Class) -> bool:
    return kind.__module__.startswith("peft.")


def _may_adapt(kind: Class) -> bool:
    containers = tuple(container for container, child in _containers() if child != "base_layer")
    return not issubclass(kind, containers) and (_of_peft(kind) or issubclass(kind, _containers()[2][0]))


def copied_modules(modules: ByClass) -> list[nn.Module]:
    """Full modules that are trained in place of the base's, as modules_to_save has them.

    Args:
        modules: of a model, all.
    """
    # PEFT's copy-and-train wrapper around a base module.
    wrappers = of_class(modules, lambda kind: issubclass(kind, _containers()[-1][0]))
    return [copy for module in wrappers for copy in getattr(module, "modules_to_save", {}).values()]


def prompt_encoders(modules: ByClass) -> list[nn.Module]:
    """Modules of prompt learners. peft saves what their forwards make (`PeftModel.get_prompt_embedding_to_save`).

    Args:
        modules: of a model, all.
    """
    models = of_class(modules, lambda kind: issubclass(kind, _containers()[0][0]))
    # Not by `getattr`, which asks the base too: one may have a module of that name.
    return [module for model in models if (module := model._modules.get("prompt_encoder")) is not None]


def scheduled(modules: ByClass) -> list[nn.Module]:
    """Layers whose ranks are scheduled by all of their tensors and gradients; AdaLora's are in a penalty too.

    https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/adalora/model.py

    Args:
        modules: of a model, all.
    """
    homes = ("peft.tuners.adalora.", "peft.tuners.adamss.")
    return [item for item in adapted(modules) if any(base.__module__.startswith(homes) for base in type(item).__mro__)]


READ_ELSEWHERE = (
    (prompt_encoders, "peft saves what its module makes of it"),
    (scheduled, "its tuner reads it outside of its layer"),
)
"""Modules of peft whose tensors something reads while no unit is gathered, and what it is."""
