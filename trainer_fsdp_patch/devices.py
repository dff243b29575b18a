"""The accelerator that is there, whatever its make: CUDA, ROCm (which torch calls cuda too), XPU, NPU, or none.

Nothing else in this package names one. torch says which it was built for, and each has a module of its name in torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

VISIBLE = {
    "cuda": "CUDA_VISIBLE_DEVICES",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
    "xpu": "ZE_AFFINITY_MASK",
}
"""Variables that choose devices, by kind; an empty one hides those of CUDA, ROCm and NPU."""


class Device(NamedTuple):
    """What a device says of itself.

    Attributes:
        name: as its maker calls it.
        total: bytes of its memory.
        capability: of its architecture, such as "9.0"; "" where it has none.
    """

    name: str
    total: int
    capability: str


def current() -> torch.device:
    """The accelerator that is there, also one on which no ranks can train, or the CPU."""
    import torch

    # until torch 2.6: it has no name for whatever accelerator is there
    if not hasattr(torch, "accelerator"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.accelerator.current_accelerator()
    if found is None:
        return torch.device("cpu")
    # torch.accelerator's own question begins the runtime of CUDA in some releases. That of the module need not.
    is_available = getattr(module(found.type), "is_available", torch.accelerator.is_available)
    return found if is_available() else torch.device("cpu")


def kind() -> str:
    """Type of the accelerator on which ranks can train; "cpu" where there is none, or torch has no collectives on it.

    For CUDA it is asked without the runtime where `keep_forkable` came first.
    """
    found = current().type
    return found if backend(found) not in ("", "gloo") else "cpu"


def backend(kind: str) -> str:
    """Torch's collectives for devices of a kind, such as "nccl"; "" where it has none.

    Args:
        kind: type of a torch.device.
    """
    import torch.distributed as dist

    if not dist.is_available():
        return ""
    # until torch 2.6: the question has no function of its own
    if not hasattr(dist, "get_default_backend_for_device"):
        return str(dist.Backend.default_device_backend_map.get(kind, ""))
    try:
        return str(dist.get_default_backend_for_device(kind))
    except ValueError:
        return ""


def module(kind: str) -> Any:
    """Torch's module for devices of a kind, such as `torch.cuda`."""
    import torch

    return getattr(torch, kind)


def count() -> int:
    """Number of devices on which ranks can train; 0 where there is no such accelerator."""
    found = kind()
    return 0 if found == "cpu" else int(module(found).device_count())


def described(module: Any, index: int) -> Device:
    """What a device says of itself; this begins the accelerator's runtime.

    Args:
        module: torch's module for its kind.
        index: of the device, among those that are visible.
    """
    properties = module.get_device_properties(index)
    major, minor = (getattr(properties, name, None) for name in ("major", "minor"))
    return Device(
        str(module.get_device_name(index)),
        int(properties.total_memory),
        "" if major is None or minor is None else f"{major}.{minor}",
    )


def keep_forkable() -> None:
    """Have torch count CUDA's devices without its runtime: a process that has begun that cannot fork ranks.

    An import may begin it all the same, as those of bitsandbytes and torchao do: `has_begun` tells.
    """
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


def has_begun() -> bool:
    """Whether this process has begun the accelerator's runtime, which none that it forks can use."""
    found = current().type
    ask = getattr(module(found), "is_initialized", None)
    # A CPU says that it has, and can be forked.
    return found != "cpu" and ask is not None and bool(ask())


def out_of_memory() -> type[RuntimeError]:
    """Torch's error where an accelerator has no memory left."""
    import torch

    # until torch 2.5: only CUDA's module has it
    error: type[RuntimeError] = getattr(torch, "OutOfMemoryError", None) or torch.cuda.OutOfMemoryError
    return error
