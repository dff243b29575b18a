"""Names of tensors without the segments that wrappers put in, and models without the wrappers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from torch import nn

WRAPPERS = frozenset(("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"))
"""Children of modules that FSDP1, checkpointing and compile put around others."""

_WRAPPERS = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(sorted(WRAPPERS))})(?:\.|$)")


PACKED = "packed_bytes"
"""Name of the frozen parameter that has the bytes of a quantized layer."""


def canonical(name: str) -> str:
    """Name of a tensor or module without the segments that FSDP1, checkpointing and compile put in."""
    return _WRAPPERS.sub("", name).rstrip(".")


def file_key(key: str, adapter: str = "default") -> str:
    """Key of an adapter file for a tensor's name in the model.

    Args:
        key: name of the tensor, with or without the segments of wrappers.
        adapter: name of its adapter, which no key of a file has.
    """
    helpers = ("modules_to_save", "token_adapter", adapter)
    return ".".join(part for part in canonical(key).split(".") if part not in helpers)


def unwrap(model: nn.Module) -> nn.Module:
    """The model below the wrappers that go around a full one: FSDP1, DDP, DataParallel and compile."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn import DataParallel
    from torch.nn.parallel import DistributedDataParallel

    while True:
        # Compiled models are known by a child. Their class is in torch._dynamo, which takes seconds to import.
        if "_orig_mod" in getattr(model, "_modules", ()):
            model = cast("nn.Module", model._orig_mod)
        elif isinstance(model, (FullyShardedDataParallel, DistributedDataParallel, DataParallel)):
            model = model.module
        else:
            return model


def without_checkpointing(module: nn.Module | None) -> nn.Module | None:
    """The module inside of the wrappers that activation checkpointing and its offloading put around, or itself."""
    while "_checkpoint_wrapped_module" in getattr(module, "_modules", ()):
        module = cast("nn.Module", module)._modules["_checkpoint_wrapped_module"]
    return module
