"""FSDP1's `summon_full_params` around a planned model: a forward inside it leaves the units as they were summoned."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

from trainer_fsdp_patch.planning.prepared import prepared_with
from trainer_fsdp_patch.shadowing import shadowed

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._common_utils import HandleTrainingState
    from torch.distributed.fsdp._flat_param import FlatParamHandle


def summoned(
    upstream: Callable[..., contextlib.AbstractContextManager[None]],
    module: nn.Module,
    *args: object,
    **kwargs: object,
) -> contextlib.AbstractContextManager[None]:
    """Full parameters that a forward does not shard again.

    FSDP1 writes what is summoned back at the end. A forward inside has sharded it by then. Each rank would write a
    slice of its own shard over the start of it.

    Args:
        upstream: torch's `summon_full_params`.
        module: as given to it.
        *args: for upstream.
        **kwargs: for upstream.

    Returns:
        A context manager; upstream's own where the module has nothing to do with a planned model.
    """
    context = upstream(module, *args, **kwargs)
    return _kept_full(context, module) if _planned_units(module) else context


def _planned_units(module: nn.Module) -> list[FullyShardedDataParallel]:
    """FSDP1's units in a module that belong to planned models."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    units = [item for item in module.modules() if isinstance(item, FullyShardedDataParallel)]
    return [item for item in units if prepared_with(item) is not None]


@contextlib.contextmanager
def _kept_full(context: contextlib.AbstractContextManager[None], module: nn.Module) -> Iterator[None]:
    with context:
        units = [unit for unit in _planned_units(module) if _is_summoned(unit)]
        states = {id(unit): _handle(unit)._training_state for unit in units}
        try:
            with contextlib.ExitStack() as stack:
                for unit in units:
                    ours: dict[str, Callable[..., object]] = {
                        "forward": functools.partial(_forward, unit, unit.forward, states[id(unit)])
                    }
                    if "generate" in vars(unit):
                        # It gathers the root's parameters, which are here, by a forward of the root.
                        ours["generate"] = cast("Callable[..., object]", unit._fsdp_wrapped_module.generate)
                    # On the instances: units of other models have the same classes.
                    stack.enter_context(shadowed(unit, **ours))
                    stack.enter_context(shadowed(unit._handle, reshard=_stay_full))
                yield
        finally:
            for unit in units:
                _restore(unit, states[id(unit)])


def _is_summoned(unit: FullyShardedDataParallel) -> bool:
    """Whether this rank holds the full parameters of a unit, as it does not on others with `rank0_only`."""
    handle = unit._handle
    if handle is None or not handle.uses_sharded_strategy:
        return False
    return handle._training_state.name == "SUMMON_FULL_PARAMS" and not handle.is_sharded(handle.flat_param)


def _handle(unit: FullyShardedDataParallel) -> FlatParamHandle:
    """The handle of a unit that is summoned, which has one."""
    handle = unit._handle
    assert handle is not None
    return handle


def _stay_full(free_unsharded_flat_param: bool) -> None:
    """In place of a unit's `reshard`."""


def _forward(
    unit: FullyShardedDataParallel,
    upstream: Callable[..., object],
    state: HandleTrainingState,
    *args: object,
    **kwargs: object,
) -> object:
    """Forward of a unit whose parameters are full: nothing has to be gathered, so one rank can do it alone."""
    import torch

    if not torch.is_grad_enabled() and _handle(unit).flat_param.device == unit.compute_device:
        return unit._fsdp_wrapped_module(*args, **kwargs)
    # A backward pass needs the hooks that FSDP1 registers in its own forward.
    result = upstream(*args, **kwargs)
    _restore(unit, state)
    return result


def _restore(unit: FullyShardedDataParallel, state: HandleTrainingState) -> None:
    """Have a unit's parameters be those that were summoned, in full precision, after FSDP1 used others."""
    handle = _handle(unit)
    if handle._training_state == state:
        return
    if handle._uses_param_mixed_precision and not handle._force_full_precision:
        # torch gives this method no types.
        handle._free_unsharded_flat_param()  # type: ignore[no-untyped-call]
    handle._training_state = state
    handle._use_unsharded_flat_param(handle._get_padded_unsharded_flat_param())
    handle._use_unsharded_views(as_params=True)
