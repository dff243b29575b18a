"""Models that FSDP wrapped before `patch()` came, so that no patch has seen them."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def models() -> list[str]:
    """Class names of the wrapped models that are alive.

    Nothing is imported, and nothing is searched before a process group exists: no model can be wrapped then.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return []
    fsdp1 = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    fsdp2 = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    kinds = tuple(kind for kind in (fsdp1, fsdp2) if kind is not None)
    # `isinstance` would ask for `__class__`, which lazy objects answer by running code.
    wrapped: list[nn.Module] = [item for item in gc.get_objects() if issubclass(type(item), kinds)]
    inner = {id(child) for item in wrapped for child in item.modules() if child is not item}
    return sorted({_name(item) for item in wrapped if id(item) not in inner})


def _name(item: nn.Module) -> str:
    """FSDP2 derives a class of its own from the model's; FSDP1 puts the model inside."""
    module = getattr(item, "_fsdp_wrapped_module", None)
    return type(item if module is None else module).__name__.removeprefix("FSDP")
