"""The optimizer's part of a resume checkpoint: torch sends all ranks what rank 0 has read, in plain tensors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.measuring import footprint
from trainer_fsdp_patch.names import canonical
from trainer_fsdp_patch.planning.prepared import Prepared, prepared_for
from trainer_fsdp_patch.ranks import agreement
from trainer_fsdp_patch.shadowing import shadowed

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.checkpoint.state_dict import StateDictOptions

StateDict = dict[str, Any]
"""An optimizer's: `state`, a dictionary for each parameter, and `param_groups`."""


class Held(str):
    """State that is no plain tensor, on its way through functions of torch that send it on as it is.

    They pass a string on, and ask what they take for a tensor for its copy on the CPU.
    """

    value: object

    def cpu(self) -> Held:
        """Itself: what is held is on the CPU."""
        return self


def load(
    upstream: Callable[..., object],
    model: nn.Module,
    optimizers: torch.optim.Optimizer,
    optim_state_dict: StateDict | None,
    *,
    options: StateDictOptions | None = None,
) -> object:
    """Read an optimizer's checkpoint under FSDP2, whatever the optimizer keeps, and where it keeps nothing.

    torch asks the tensors of the state for a device, and plain SGD has none. It broadcasts quantized tensors by an
    operation that they do not have.

    Args:
        upstream: torch's `set_optimizer_state_dict`; it is asked wherever there is state.
        model: as prepared by accelerate.
        optimizers: the optimizer.
        optim_state_dict: of the checkpoint; with `full_state_dict` rank 0 has it alone.
        options: torch's StateDictOptions, or None.
    """
    prepared = prepared_for(model)
    # torch takes several optimizers too.
    if prepared is None or options is None or not hasattr(optimizers, "param_groups"):
        return upstream(model, optimizers, optim_state_dict, options=options)
    read = functools.partial(upstream, model, optimizers)
    if not options.full_state_dict:
        return _load_shards(read, model, optimizers, optim_state_dict or {}, options)
    given = optim_state_dict or {}
    settings = [{k: v for k, v in group.items() if k != "params"} for group in given.get("param_groups", ())]
    stateless = not any(given.get("state", {}).values())
    found = stateless, settings, _lists_all(model, optimizers, given)
    stateless, settings, lists_all = agreement.from_main(found, "load of the optimizer")
    if not stateless:
        released = functools.partial(_load_released, optimizers.load_state_dict)
        with shadowed(optimizers, load_state_dict=released):
            return read(_hold(prepared, optim_state_dict, numbers=False), options=_lenient(options, lists_all))
    for group, setting in zip(optimizers.param_groups, settings, strict=True):
        group.update(setting)
    return None


def _load_shards(
    upstream: Callable[..., object],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    given: StateDict,
    options: StateDictOptions,
) -> object:
    """Load what a sharded checkpoint has. It keeps settings by names, so that a group without parameters has none."""
    before = [dict(group) for group in optimizer.param_groups]
    result = upstream(given, options=_lenient(options, _lists_all(model, optimizer, given)))
    for group, known in zip(optimizer.param_groups, before, strict=True):
        group.update({key: value for key, value in known.items() if key not in group})
    return result


def _lists_all(model: nn.Module, optimizer: torch.optim.Optimizer, given: StateDict) -> bool:
    """Whether the groups of a checkpoint name all that an optimizer trains, with state or without."""
    trained = {id(item) for group in optimizer.param_groups for item in group["params"] if item.requires_grad}
    names = {canonical(name) for name, parameter in model.named_parameters() if id(parameter) in trained}
    return names <= {name for group in given.get("param_groups", ()) for name in group["params"]}


def _lenient(options: StateDictOptions, lists_all: bool) -> StateDictOptions:
    """Options for a checkpoint that may lack the state of parameters that no batch had reached: torch refuses those.

    What a checkpoint does not even list is missing, and stays refused.
    """
    return dataclasses.replace(options, strict=False) if lists_all else options


def _load_released(upstream: Callable[[StateDict], object], state_dict: StateDict) -> object:
    return upstream(_release(state_dict))


def to_load(
    upstream: Callable[..., StateDict],
    model: nn.Module,
    optim: torch.optim.Optimizer,
    optim_state_dict: StateDict | None,
    *args: object,
    **kwargs: object,
) -> StateDict:
    """What FSDP1 makes of an optimizer's checkpoint.

    A distributed checkpoint has no entry where there was no state. On the rank that has read a full one, torch asks
    all state for its copy on the CPU, numbers too: https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1381

    Args:
        upstream: torch's `optim_state_dict_to_load`.
        model: as wrapped by FSDP1.
        optim: the optimizer.
        optim_state_dict: of the checkpoint; empty on ranks that get it from rank 0.
        *args: for upstream.
        **kwargs: for upstream.
    """
    prepared = prepared_for(model)
    if prepared is None:
        return upstream(model, optim, optim_state_dict, *args, **kwargs)
    if optim_state_dict and "state" not in optim_state_dict:
        optim_state_dict = {**optim_state_dict, "state": {}}
    held = _hold(prepared, optim_state_dict, numbers=True) if _is_full(model) else optim_state_dict
    # Upstream may load it too, with `load_directly`.
    load = functools.partial(_load_released, optim.load_state_dict)
    # FSDP1 asks its first unit for what it is to do, and has none where the whole base is resident.
    if not footprint.units(model):
        upstream = _without_units
    with shadowed(optim, load_state_dict=load):
        return _release(upstream(model, optim, held, *args, **kwargs))


def _without_units(
    model: nn.Module,
    optim: torch.optim.Optimizer,
    optim_state_dict: StateDict | None,
    is_named_optimizer: bool = False,
    load_directly: bool = False,
    group: object = None,
) -> StateDict:
    """What FSDP1 would make of a checkpoint by names if it had no unit: the same by the optimizer's numbers.

    Args:
        model: as wrapped by FSDP1.
        optim: the optimizer.
        optim_state_dict: of the checkpoint, by names; empty on ranks that get it from rank 0.
        is_named_optimizer: without meaning here.
        load_directly: whether the optimizer loads it too.
        group: without meaning here.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    settings = FullyShardedDataParallel.get_state_dict_type(model).optim_state_dict_config
    given = optim_state_dict or {}
    if getattr(settings, "rank0_only", False):
        given = agreement.from_main(given, "load of the optimizer")
    stepped = [parameter for group in optim.param_groups for parameter in group["params"]]
    places = {id(parameter): place for place, parameter in enumerate(stepped)}
    named = model.named_parameters(remove_duplicate=False)
    numbers = {canonical(name): places[id(item)] for name, item in named if id(item) in places}
    loaded: StateDict = {
        "state": {numbers[canonical(name)]: state for name, state in given["state"].items()},
        "param_groups": [
            {**group, "params": sorted(numbers[canonical(name)] for name in group["params"])}
            for group in given["param_groups"]
        ],
    }
    if load_directly:
        optim.load_state_dict(loaded)
    return loaded


def _is_full(model: nn.Module) -> bool:
    """Whether FSDP1 is asked for full state dicts now."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return "FULL" in str(FullyShardedDataParallel.get_state_dict_type(model).state_dict_type)


def _hold(prepared: Prepared, state_dict: StateDict | None, *, numbers: bool) -> StateDict | None:
    """A checkpoint of an optimizer in which torch's functions find nothing that they cannot send.

    Args:
        prepared: whose sharded parameters torch makes shards for; of these, tensors stay as they are.
        state_dict: of the checkpoint, by parameter names; None or empty on ranks that have not read it.
        numbers: whether whatever is no tensor is held too: numbers, None, and dictionaries with tensors inside.
    """
    if not state_dict or "state" not in state_dict:
        return state_dict

    def held(name: str, value: object) -> object:
        import torch

        if isinstance(value, torch.Tensor):
            wraps = _is_wrapped(value) and canonical(name) not in prepared.sharded_names
            return _held(value) if wraps else value
        return _held(value) if numbers else value

    state = {
        name: {key: held(name, value) for key, value in entry.items()} if isinstance(entry, dict) else entry
        for name, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor has others inside, as quantized ones do; those are nobody's shards."""
    return hasattr(tensor, "__tensor_flatten__") and not isinstance(tensor, inventory.dtensor())


def _held(value: object) -> Held:
    # Flat parameters ask whether the state of all their parts is the same.
    held = Held(id(value) if isinstance(value, dict) or hasattr(value, "cpu") else repr(value))
    held.value = _on_cpu(value)
    return held


def _on_cpu(value: object) -> object:
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return value.cpu() if hasattr(value, "cpu") else value


def _release(state_dict: StateDict) -> StateDict:
    """The same, with what was held."""
    if isinstance(state_dict, dict) and isinstance(state_dict.get("state"), dict):
        for entry in state_dict["state"].values():
            if isinstance(entry, dict):
                entry.update({key: value.value for key, value in entry.items() if isinstance(value, Held)})
    return state_dict
