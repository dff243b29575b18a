"""FSDP2 takes a planned model: what it ignores is hidden, impossible units are skipped, the forward is cast."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from trainer_fsdp_patch.errors import PlanError
from trainer_fsdp_patch.inspecting import inventory, units
from trainer_fsdp_patch.packing.packed import packed_of
from trainer_fsdp_patch.planning.prepared import prepared_for
from trainer_fsdp_patch.shadowing import shadowed

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn


@contextlib.contextmanager
def hide_ignored(model: nn.Module) -> Iterator[None]:
    """Hide what is not FSDP's while FSDP2 takes a model, then put the same objects back.

    Hidden tensors are neither sharded nor moved to meta nor asked to be DTensors, on any torch.
    """
    prepared = prepared_for(model)
    if prepared is None:
        yield
        return
    taken = inventory.take(model)
    hidden = [slot for slot in taken.slots if id(slot.tensor) in prepared.known]
    layers, dtype = {id(slot.module): slot.module for slot in hidden if not slot.owned}, getattr(model, "dtype", None)
    with contextlib.ExitStack() as stack:
        for slot in hidden:
            stack.callback(slot.holder.__setitem__, slot.key, slot.tensor)
            slot.holder[slot.key] = None
        for layer in layers.values():
            stack.enter_context(shadowed(layer, **_plain(layer)))
        # until accelerate 1.14: it asks for the dtype, which a model that shows no parameter cannot tell
        stack.enter_context(shadowed(model, tie_weights=_tie_again(taken), dtype=dtype))
        stack.enter_context(skip_impossible_units(model))
        yield


def _plain(layer: nn.Module) -> dict[str, Any]:
    """Methods by which accelerate takes the state dict of all. quanto's own ones read the weight that is hidden."""
    from torch.nn import Module

    return {name: getattr(Module, name).__get__(layer) for name in ("_save_to_state_dict", "_load_from_state_dict")}


@contextlib.contextmanager
def keep_dtype(model: nn.Module) -> Iterator[None]:
    """Ignore casts of a planned model: what is frozen keeps its dtype, and packed weights their bytes.

    https://github.com/huggingface/accelerate/pull/3848
    """
    import torch

    if prepared_for(model) is None:
        yield
        return
    upstream = cast("Callable[[object], object]", model.to)

    def to(target: object) -> object:
        return model if isinstance(target, torch.dtype) else upstream(target)

    with shadowed(model, to=to):
        yield


@contextlib.contextmanager
def skip_impossible_units(model: nn.Module) -> Iterator[None]:
    """Around accelerate's FSDP2 of a planned model: what cannot be a unit stays with the one around it.

    Args:
        model: planned; what is ignored is hidden already.
    """
    token = _SHARDING.set(_Sharding(model, units.parts(model), units.others(model), []))
    try:
        yield
    finally:
        _SHARDING.reset(token)


class _Sharding(NamedTuple):
    """What is known of a model while accelerate shards it.

    Attributes:
        model: planned.
        within: modules that work as a part of a unit only, by identity.
        others: what each module shares parameters with, from `units.others`.
        waiting: modules that were asked for and share parameters with one that was not yet.
    """

    model: nn.Module
    within: set[int]
    others: dict[int, set[int]]
    waiting: list[nn.Module]


_SHARDING: ContextVar[_Sharding | None] = ContextVar("trainer_fsdp_patch_sharding", default=None)


def is_sharding(instance: object, arguments: dict[str, object]) -> bool:
    """Whether accelerate is sharding a planned model, and the call is about a part of it."""
    return _SHARDING.get() is not None


def fully_shard(
    upstream: Callable[..., object], module: nn.Module | list[nn.Module] | tuple[nn.Module, ...], **kwargs: object
) -> object:
    """Make a module a unit of FSDP2 if it can be one; what cannot stays with the one around it.

    Args:
        upstream: torch's `fully_shard`.
        module: the planned model, a part of it, or a list of parts.
        kwargs: for upstream.

    Returns:
        `module`, as upstream has it.

    Raises:
        PlanError: parameters are to be ignored on a torch before 2.7, which cannot.
    """
    sharding = _SHARDING.get()
    assert sharding is not None
    # until torch 2.7
    known = "ignored_params" not in kwargs or "ignored_params" in inspect.signature(upstream).parameters
    if not known and kwargs.pop("ignored_params"):
        _refuse_ignored()
    if module is sharding.model:
        return upstream(module, **kwargs)
    modules = list(module) if isinstance(module, (list, tuple)) else [module]
    # What is resident is hidden, and leaves nothing to gather.
    able = all(_is_unit(item) and id(item) not in sharding.within for item in modules)
    if not able or not any(True for item in modules for _ in item.parameters()):
        return module
    if not units.reaches_outside(modules, sharding.others):
        return upstream(module, **_reducing_nothing(modules, kwargs))
    # accelerate sees no ties through PEFT's wrappers: it asks for the embeddings, and for the head later.
    tied = [item for item in sharding.waiting if _is_unit(item) and not _nested(item, modules)]
    if tied and not units.reaches_outside([*tied, *modules], sharding.others):
        upstream([*tied, *modules], **_reducing_nothing([*tied, *modules], kwargs))
    else:
        sharding.waiting.extend(modules)
    return module


def _reducing_nothing(modules: list[nn.Module], kwargs: dict[str, object]) -> dict[str, object]:
    """Arguments for a frozen unit, without a dtype to reduce in.

    Where that is another than it computes in, torch looks for gradients at the end of a backward pass without a
    reduction. It has none to look at in a unit that no forward has used, such as a head next to its trained copy.
    """
    policy: Any = kwargs.get("mp_policy")
    parameters = [item for module in modules for child in _own(module) for item in child._parameters.values()]
    frozen = not any(item is not None and item.requires_grad for item in parameters)
    if policy is None or not frozen or policy.reduce_dtype in (None, policy.param_dtype):
        return kwargs
    return {**kwargs, "mp_policy": dataclasses.replace(policy, reduce_dtype=None)}


def _is_unit(module: nn.Module) -> bool:
    """Whether torch takes a module: containers have no forward to gather before, and a unit's parts are taken."""
    from torch import nn

    # A packed layer is shown by the unit that it is a part of.
    if type(module).forward is nn.Module.forward or packed_of(module) is not None:
        return False
    own = [item for child in _own(module) for item in child._parameters.values()]
    return not any(isinstance(item, inventory.dtensor()) for item in own)


def _own(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those below it that are not in units of their own."""
    from torch.distributed.fsdp import FSDPModule

    pending = [module]
    while pending:
        item = pending.pop()
        yield item
        pending += [child for child in item.children() if not isinstance(child, FSDPModule)]


def _nested(one: nn.Module, others: list[nn.Module]) -> bool:
    """Whether a module is inside one of the others, or has one of them inside."""
    below = {id(part) for part in one.modules()}
    return any(id(other) in below or any(part is one for part in other.modules()) for other in others)


def _tie_again(taken: inventory.Inventory) -> Callable[[], None]:
    """A `tie_weights` that ties what was tied, wherever PEFT's wrappers have put it since.

    transformers finds tied weights by the names that the base had before.
    """
    groups = [slots for slots in taken.shared() if len(slots) > 1 and slots[0].kind == "parameter"]

    def tie_weights() -> None:
        for first, *others in groups:
            for other in others:
                other.holder[other.key] = first.holder[first.key]

    return tie_weights


def autocast_prepared(accelerator: Accelerator, results: object) -> None:
    """Run planned models under autocast and return fp32, as accelerate does for one process, DDP and FSDP1.

    Args:
        accelerator: the run's.
        results: what its `_prepare_fsdp2` returns, models among it.
    """
    from accelerate.utils import convert_outputs_to_fp32
    from accelerate.utils.modeling import get_mixed_precision_context_manager
    from torch import nn

    # Programs that stand in for an accelerator may return anything.
    for model in results if isinstance(results, (list, tuple)) else ():
        if not isinstance(model, nn.Module) or prepared_for(model) is None:
            continue
        if accelerator.native_amp and "_original_forward" not in vars(model):
            # The attribute is accelerate's own mark, by which unwrap_model takes the autocast off again.
            vars(model)["_original_forward"] = model.forward
            context = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
            function = getattr(model.forward, "__func__", None)
            if function is None:
                model.forward = convert_outputs_to_fp32(context(model.forward))
            else:
                model.forward = MethodType(convert_outputs_to_fp32(context(function)), model)


def _refuse_ignored() -> None:
    raise PlanError(
        "ignored_modules",
        "given for FSDP2 on a torch that cannot ignore parameters",
        "They would be sharded against your setting",
        "Use torch 2.7 or newer, or leave ignored_modules out",
        setting="ignored_modules",
    )
