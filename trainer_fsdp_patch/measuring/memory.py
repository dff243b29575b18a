"""What a rank has room for before training: free memory of its device, and an estimate of the activations."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from trainer_fsdp_patch import devices
from trainer_fsdp_patch.inspecting.inventory import nbytes_of
from trainer_fsdp_patch.ranks import collectives

if TYPE_CHECKING:
    import torch
    from torch import nn

LENGTH = 4096
"""Tokens of a row where neither the arguments nor the model set fewer."""

MARGIN = 10
"""A so-many-th of the device stays free, for what no estimate knows: fragments, libraries, the user's own."""

_LAYER = 17
"""Values that a layer keeps for its backward pass, for each token and feature: Korthikanti et al., 2205.05198."""


class Room(NamedTuple):
    """What a rank has room for.

    Attributes:
        free: bytes, what it holds of the model already among them.
        total: bytes of the device.
        activations: bytes that a forward and a backward pass are estimated to keep.
    """

    free: int
    total: int
    activations: int

    @property
    def usable(self) -> int:
        """Bytes for parameters, gradients and optimizer states."""
        return self.free - self.activations - self.total // MARGIN


def measured(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of a device, or of a rank's part of the machine where it is the CPU."""
    if device.type == "cpu":
        import psutil  # type: ignore[import-untyped, unused-ignore]

        here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
        found = psutil.virtual_memory()
        return int(found.available) // here, int(found.total) // here
    module = devices.module(device.type)
    free, total = module.mem_get_info(device)
    # torch keeps what it has freed, and hands it out again.
    return int(free + module.memory_reserved(device) - module.memory_allocated(device)), int(total)


meter: Callable[[torch.device], tuple[int, int]] = measured
"""What is asked for free and total bytes; tests put their own in its place."""


def room(model: nn.Module, device: torch.device | None = None, arguments: object = None) -> Room:
    """What this rank has room for.

    Args:
        model: before FSDP takes it.
        device: of the rank; None is the accelerator that is there, or the CPU.
        arguments: TrainingArguments, or None for one row.
    """
    device = device or devices.current()
    free, total = meter(device)
    held = {id(item): nbytes_of(item) for item in model.parameters() if item.device.type == device.type}
    return Room(free + sum(held.values()), total, activations(model, total, arguments))


def activations(model: nn.Module, total: int, arguments: object = None) -> int:
    """Bytes that a forward and a backward pass keep, roughly; a quarter of the device for a model of unknown shape.

    Args:
        model: whose `config` has its sizes.
        total: bytes of the device.
        arguments: TrainingArguments, or None for one row.
    """
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    hidden, layers = (getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers"))
    if not isinstance(hidden, int) or not isinstance(layers, int):
        return total // 4
    size = 2 if any(getattr(arguments, name, False) for name in ("bf16", "fp16")) else _itemsize(model)
    length = next((int(value) for value in _lengths(config, arguments) if value), LENGTH)
    layer = _LAYER * hidden
    if getattr(config, "_attn_implementation", None) == "eager":
        # Scores, their softmax and its dropout.
        layer += 3 * int(getattr(config, "num_attention_heads", 0) or 0) * length
    recomputed = bool(getattr(arguments, "gradient_checkpointing", False)) or bool(
        (getattr(arguments, "fsdp_config", None) or {}).get("activation_checkpointing")
    )
    kept = layers * hidden + layer if recomputed else layers * layer
    # Logits in the dtype of the model, in fp32, and their gradient.
    logits = int(getattr(config, "vocab_size", 0) or 0) * (size + 8)
    rows = int(getattr(arguments, "per_device_train_batch_size", None) or 1)
    return rows * length * (kept * size + logits)


def _lengths(config: object, arguments: object) -> list[int | None]:
    # TRL's arguments have one of these.
    asked = [getattr(arguments, name, None) for name in ("max_length", "max_seq_length")]
    most = getattr(config, "max_position_embeddings", None)
    return [*asked, min(int(most), LENGTH) if most else None]


def _itemsize(model: nn.Module) -> int:
    return min((item.element_size() for item in model.parameters() if item.is_floating_point()), default=4)


def left(device: torch.device) -> tuple[int, int]:
    """Bytes of a device that nothing has used since the last call, or of the CPU now, and all of its bytes."""
    free, total = measured(device)
    if device.type == "cpu":
        return free, total
    module = devices.module(device.type)
    peak = int(module.max_memory_allocated(device) - module.memory_allocated(device))
    module.reset_peak_memory_stats(device)
    return free - peak, total


gauge: Callable[[torch.device], tuple[int, int]] = left
"""What is asked between steps; tests put their own in its place."""


def least_spare(device: torch.device) -> int:
    """The least that was left on any rank, less the margin, by one collective.

    Args:
        device: of the rank.

    Raises:
        RankError: another rank has ended.
    """
    free, total = gauge(device)
    return _least([free - total // MARGIN], device)[0]


def least(here: Room, device: torch.device) -> Room:
    """The least that any rank has room for, by one collective.

    Args:
        here: of this rank.
        device: of the collectives.

    Raises:
        RankError: another rank has ended.
    """
    # Activations are the same on all; where they are not, the largest count.
    free, total, negative = _least([here.free, here.total, -here.activations], device)
    return Room(free, total, -negative)


def _least(values: list[int], device: torch.device) -> list[int]:
    import torch
    import torch.distributed as dist

    sizes = torch.tensor(values, dtype=torch.int64, device=device)
    with collectives.collective("least free memory of the ranks"):
        dist.all_reduce(sizes, op=dist.ReduceOp.MIN)
    return [int(size) for size in sizes.tolist()]
