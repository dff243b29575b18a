"""Weights of the embeddings, which peft writes next to an adapter that targets or resizes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.names import canonical, unwrap

if TYPE_CHECKING:
    import torch
    from torch import nn


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of the input and output embeddings by canonical name, as they stand in a model, wrapped or not."""
    unwrapped = unwrap(model)
    getters = ("get_input_embeddings", "get_output_embeddings")
    layers = [getattr(unwrapped, getter)() for getter in getters if hasattr(unwrapped, getter)]
    wanted = {id(module) for layer in layers if layer is not None for module in layer.modules()}
    return {canonical(name): module for name, module in model.named_modules() if id(module) in wanted}


def full_weights(model: nn.Module, known: set[str], *, kept: bool) -> dict[str, torch.Tensor]:
    """Full weights of the input and output embeddings that are not known; every rank takes part.

    Args:
        model: as wrapped by FSDP.
        known: canonical names of what is not wanted.
        kept: whether this rank keeps them, and does not only take part.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    modules = modules_of(model)
    wanted = {id(module) for module in modules.values()}
    result: dict[str, torch.Tensor] = {}

    def collect(named: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in named:
            if canonical(name).rpartition(".")[0] in modules and canonical(name) not in known:
                full = tensor.full_tensor() if isinstance(tensor, inventory.dtensor()) else tensor
                if kept:
                    result[canonical(name)] = full.detach().cpu().clone()

    with contextlib.ExitStack() as stack:
        # With units by size an embedding may be one, or be in one.
        for unit in model.modules():
            if isinstance(unit, FullyShardedDataParallel) and any(id(module) in wanted for module in unit.modules()):
                stack.enter_context(FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False))
        collect(model.named_parameters())
    return result
