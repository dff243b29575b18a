"""What peft's `get_peft_model_state_dict` gives of a planned model: to a save, to one rank alone, of a user's dict."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch.errors import AdapterError, warn
from trainer_fsdp_patch.names import canonical, unwrap
from trainer_fsdp_patch.planning.prepared import Prepared, prepared_for
from trainer_fsdp_patch.ranks import collectives
from trainer_fsdp_patch.saving import adapter_state, embeddings, gathering, naming

if TYPE_CHECKING:
    import torch
    from torch import nn

_FLAT = "_flat_param"


def answer(
    upstream: Callable[..., dict[str, torch.Tensor]], arguments: dict[str, Any], *, to_file: bool
) -> dict[str, torch.Tensor]:
    """What peft's `get_peft_model_state_dict` gives of a planned model.

    Without a state dict the answer takes no collective. The adapter is full on each rank, so that one of them may ask
    alone. Only what FSDP has sharded of it needs all ranks.

    Args:
        upstream: peft's function.
        arguments: its arguments by name.
        to_file: whether the answer is about to be written.

    Returns:
        Tensors by the keys of an adapter file.

    Raises:
        AdapterError: something sharded is asked for and the other ranks do not ask. Or what was given has the part of
            one rank. Or, on the main process, nothing of the adapter is about to be written.

    https://github.com/huggingface/peft/issues/286
    """
    prepared = prepared_for(arguments["model"])
    assert prepared is not None

    def call(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        others = {key: value for key, value in arguments.items() if key not in ("model", "state_dict")}
        return naming.call_with_canonical_names(upstream, arguments["model"], state_dict=state_dict, **others)

    given = arguments.get("state_dict")
    own = "state_dict" in vars(unwrap(arguments["model"]))
    if given is None and own:
        # A user has put a function of their own there, as alpaca-lora's script does. Or a save has, for what it
        # gathered.
        return call(unwrap(arguments["model"]).state_dict())
    if given and own and prepared.native and to_file:
        # until transformers 5.21
        # Its save of a base that it sharded gives what is trained, and peft asks for frozen projections too.
        given = {**unwrap(arguments["model"]).state_dict(), **given}
    if given is None:
        return _asked(call, arguments["model"], prepared)
    if not given and not collectives.is_main():
        # Only the main process has a full state dict, and some of peft's methods fail where a key is missing.
        return {}
    named = given
    if any(canonical(key) != key for key in given):
        named = {canonical(key): value for key, value in given.items()}
    parts = _parts(named, prepared)
    result = call(named)
    if collectives.is_main():
        _look_at(result, parts, given, to_file=to_file)
    return result


def _asked(
    call: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], model: nn.Module, prepared: Prepared
) -> dict[str, torch.Tensor]:
    """The answer without a state dict: first with empty tensors for what is sharded, to see whether any is asked."""
    unwrapped = unwrap(model)
    own = adapter_state.persistent(unwrapped, prepared.of_adapter()) | adapter_state.added(unwrapped, prepared)
    own = {name: tensor.detach() for name, tensor in own.items()}
    result = call(own | _empty(unwrapped, prepared, set(own)))
    asked = sorted(key for key, value in result.items() if isinstance(value, absent()))
    if not asked:
        return result
    collectives.meet(
        f"save of {asked[0]}",
        "it is sharded by FSDP, and not all ranks have asked for it",
        "Nothing was written: one rank alone would wait for the others for ever",
        "Call this on every rank, or save with Trainer.save_model()",
    )
    wrapped = prepared.wrapped()
    full = gathering.in_stored_dtype(prepared, gathering.full_tensors(wrapped, prepared))
    own |= gathering.under_all_names(prepared, full)
    return call(own | embeddings.full_weights(wrapped, set(own), kept=True))


@functools.cache
def absent() -> type[torch.Tensor]:
    """Class of tensors that stand for others: whatever torch makes of one is one."""
    import torch

    return type("Absent", (torch.Tensor,), {})


def _empty(model: nn.Module, prepared: Prepared, known: set[str]) -> dict[str, torch.Tensor]:
    """Tensors without memory in the place of what is sharded and a file may have."""
    import torch

    def empty(*shape: int) -> torch.Tensor:
        return torch.zeros(()).expand(shape).as_subclass(absent())

    stand_ins = {item.tensor.name: empty(*item.tensor.shape) for item in prepared.plan.sharded}
    stand_ins = gathering.under_all_names(prepared, stand_ins)
    modules = embeddings.modules_of(model)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        # FSDP1's flat parameter knows the names of what is in it.
        prefix = name.removesuffix(_FLAT)
        names = [f"{prefix}{item}" for item in getattr(tensor, "_fqns", ())] or [name]
        for item in map(canonical, names):
            if item.rpartition(".")[0] in modules and item not in known | stand_ins.keys():
                stand_ins[item] = empty(0)
    return stand_ins


def _parts(named: dict[str, torch.Tensor], prepared: Prepared) -> list[str]:
    """Names of the adapter's tensors that a state dict has as one rank holds them, and not full."""
    parts = []
    for item in prepared.plan.sharded:
        for name in item.tensor.names:
            if tuple(getattr(named.get(name), "shape", item.tensor.shape)) != tuple(item.tensor.shape):
                parts.append(name)
    return parts


def _look_at(
    result: dict[str, torch.Tensor], parts: list[str], given: dict[str, torch.Tensor], *, to_file: bool
) -> None:
    """Refuse, or outside of a save warn of, an answer that one process would not give.

    Raises:
        AdapterError: it is about to be written.
    """
    if parts:
        said = (
            parts[0],
            f"the given state dict has the part of one rank of it, and of {len(parts) - 1} more sharded tensors",
            "An adapter with it cannot be loaded",
            "Give accelerator.get_state_dict(model), or save with Trainer.save_model()",
        )
    elif not result:
        said = (
            "adapter",
            f"the given state dict of {len(given)} tensors has none of it",
            "A file without tensors would take the place of the adapter",
            "Give accelerator.get_state_dict(model), or leave state_dict out",
        )
    else:
        return
    if to_file:
        raise AdapterError(*said, tensor=parts[0] if parts else "")
    warn(*said)
