"""Activation checkpointing of a planned model: around what computes, and with the noise of the first forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from trainer_fsdp_patch.inspecting import tuning, units, walk
from trainer_fsdp_patch.names import canonical, unwrap, without_checkpointing
from trainer_fsdp_patch.planning.prepared import prepared_for
from trainer_fsdp_patch.preparing import fsdp_plugin

if TYPE_CHECKING:
    from torch import nn


def keep_rng_state(model: nn.Module) -> None:
    """Make recomputation under activation checkpointing draw the noise of the first forward.

    Args:
        model: with the wrappers of FSDP2's activation checkpointing.
    """
    for module in model.modules():
        function = vars(module).get("checkpoint_fn")
        if isinstance(function, functools.partial) and function.keywords.get("preserve_rng_state") is False:
            keywords = {**function.keywords, "preserve_rng_state": True}
            vars(module)["checkpoint_fn"] = functools.partial(function.func, *function.args, **keywords)


def apply(
    upstream: Callable[..., object],
    model: nn.Module,
    checkpoint_wrapper_fn: Callable[..., nn.Module] | None = None,
    check_fn: Callable[[nn.Module], bool] | None = None,
    auto_wrap_policy: object = None,
) -> object:
    """Checkpoint what accelerate's FSDP1 asks for, but for what is only a part of a layer.

    Without a policy it asks for all modules. A policy by size counts what this rank has of a module, and ranks that
    checkpoint different modules gather units in different orders: FSDP's units are taken, which are the same on all
    ranks. Layers that base_budget keeps full are no units, and are checkpointed all the same. A user who names modules
    by `check_fn` gets these.

    Args:
        upstream: torch's `apply_activation_checkpointing`.
        model: planned; its modules are wrapped in place.
        checkpoint_wrapper_fn: what wraps a module; None is torch's own.
        check_fn: which modules are wrapped.
        auto_wrap_policy: which modules are wrapped, as FSDP1 has it.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    wrapper: Callable[..., nn.Module] = checkpoint_wrapper_fn or checkpoint_wrapper
    if check_fn is not None:
        return upstream(model, wrapper, check_fn, auto_wrap_policy)
    is_part, policy = _parts(model), fsdp_plugin.without_ours(auto_wrap_policy)
    if getattr(policy, "func", policy) is size_based_auto_wrap_policy:
        policy = functools.partial(_is_among, wanted=_units(model))

    def wrap(module: nn.Module, **kwargs: object) -> nn.Module:
        return module if is_part(module) else wrapper(module, **kwargs)

    return upstream(model, wrap, auto_wrap_policy=policy)


def _is_among(module: nn.Module, recurse: bool, nonwrapped_numel: int, *, wanted: set[int]) -> bool:
    """A wrap policy of torch's kind."""
    return recurse or id(module) in wanted


def _units(model: nn.Module) -> set[int]:
    """Modules inside of FSDP1's units, the root aside, and those that stay full on each rank, by identity."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    prepared = prepared_for(model)
    resident = {home for home, _ in prepared.plan.resident} if prepared is not None else set()
    inside = {id(item.module) for item in FullyShardedDataParallel.fsdp_modules(model) if item is not model}
    return inside | {
        id(module) for name, module in unwrap(model).named_modules() if name and canonical(name) in resident
    }


def spare_parts(model: nn.Module) -> None:
    """Take activation checkpointing off what is only a part of a layer; accelerate's FSDP2 asks for no wrapper.

    Args:
        model: with the wrappers of activation checkpointing; it is changed.
    """
    is_part = _parts(model)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            module = without_checkpointing(child)
            if module is not None and module is not child and is_part(module):
                parent._modules[name] = module


def _parts(model: nn.Module) -> Callable[[nn.Module], bool]:
    """Which modules are only a part of a layer: containers, and what adapters are around.

    A wrapped dictionary does not answer `in`, by which peft finds an adapter. FSDP2 makes it a unit that nobody calls,
    so that nothing gathers it. peft saves no embedding whose class it does not see. The layer around is checkpointed.
    """
    from torch import nn

    blocks = set(getattr(model, "_no_split_modules", None) or ())
    adapted = tuning.adapted(tuning.by_class(model.modules()))
    below = (walk.below(module) for module in adapted if not units.is_around(module, blocks))
    parts = {id(part) for some in below for part in some}
    return lambda module: id(module) in parts or type(module).forward is nn.Module.forward
