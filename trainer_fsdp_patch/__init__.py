"""Repairs PEFT adapters under FSDP with the Transformers Trainer, whatever versions are installed.

    import trainer_fsdp_patch
    trainer_fsdp_patch.patch()

Importing this package does nothing; `patch()` imports none of its targets.

WHY IMPORTS STAND INSIDE FUNCTIONS. A patch has to be hooked before its target is imported, and a program that never
imports torch must not pay for it. So no module of this package imports torch, transformers, accelerate, peft or another
heavy package at its top, except below `if TYPE_CHECKING`. Functions import what they use. ruff's TID253 holds it.
"""

from __future__ import annotations

import os.path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from trainer_fsdp_patch.patching.registry import Status
    from trainer_fsdp_patch.planning.plan import Plan

__all__ = ["__version__", "patch", "plan", "status", "unpatch"]
__version__ = "0.1.0"

# In a checkout `patches/` lies next to this package and not in it; style.md 4.1 has the cases.
_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_root, "setup.cfg")):
    __path__.append(_root)


def patch(
    *names: str,
    strict: bool = False,
    adapter_placement: str | None = None,
    adapter_budget: int | None = None,
    base_budget: int | str | None = None,
) -> Sequence[Status]:
    """Repair what is installed, at once or when it is imported; a second call changes nothing.

    Args:
        names: only these patches and what they need; all where none is named.
        strict: raise where a patch that concerns the installed releases cannot be applied, instead of
            one warning. An import of a target can then fail with that error.
        adapter_placement: "auto", the default, replicates the adapter. Of one that does not fit the budget it shards
            the largest trainable tensors. "replicate" shards none, "shard" all that FSDP can.
        adapter_budget: bytes that each rank may hold under "auto" of the replicated adapter, its gradients and its
            optimizer state. The default is 1 GiB, or a rank's share of the base where that is more.
        base_budget: bytes that each rank may hold of the frozen base beyond its shards. As many FSDP units stay full as
            fit, and are gathered no more. A number, a text such as "8GiB", a share such as "25%", or "auto" for what
            the device has room for. By default none stays full.

    Returns:
        The state of every patch, as `status()` gives it. Where no target is imported yet, it is looked up when read.

    Raises:
        PatchError: a name is unknown. Or a patch asked for by name does not concern what is installed, or cannot be
            applied.
        PlanError: a setting is none that is known.
    """
    from trainer_fsdp_patch.patching import awaiting

    set_up = any(setting is not None for setting in (adapter_placement, adapter_budget, base_budget))
    if not (names or strict or set_up) and awaiting.possible():
        return awaiting.arm()
    awaiting.fire()
    from trainer_fsdp_patch.patching import registry
    from trainer_fsdp_patch.planning import budget

    budget.set_to(adapter_placement, adapter_budget, base_budget)
    return awaiting.Statuses(registry.patch(*names, strict=strict))


def unpatch() -> None:
    """Restore every patched attribute to identity; where somebody wrapped on top of us, go silent."""
    from trainer_fsdp_patch.patching import awaiting

    if awaiting.disarm() is not None:
        return
    from trainer_fsdp_patch import casts
    from trainer_fsdp_patch.patching import registry
    from trainer_fsdp_patch.planning import budget

    casts.forget()
    budget.settings = budget.Settings()
    registry.unpatch()


def status() -> list[Status]:
    """State of every patch: unused, waiting, applied, skipped (with the reason) or failed."""
    from trainer_fsdp_patch.patching import awaiting, registry

    awaiting.fire()
    return registry.status()


def plan(model: nn.Module, **settings: Any) -> Plan:
    """What will be sharded and what replicated when a model is trained, and why.

    Args:
        model: a `torch.nn.Module` that carries a PEFT adapter; meta tensors will do.
        settings: see `trainer_fsdp_patch.planning.plan.make_plan`.

    Returns:
        The plan; pure data, computed without a process group and without changing the model.

    Raises:
        PlanError: a setting contradicts the plan.
    """
    from trainer_fsdp_patch.planning.plan import make_plan

    return make_plan(model, **settings)
