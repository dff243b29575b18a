"""Resumes plain SGD under FSDP2 with full state dicts, which torch stops for want of a tensor to take a device from.

Upstream: https://github.com/pytorch/pytorch/blob/v2.9.0/torch/distributed/checkpoint/state_dict.py
"""

from __future__ import annotations

from typing import Any

from trainer_fsdp_patch import resume
from trainer_fsdp_patch.registry import Patch

patch = Patch(__name__, versions="torch>=2.2.dev0", target="torch.distributed.checkpoint.state_dict")


@patch.wrap("set_optimizer_state_dict", "model", "optimizers", "optim_state_dict", "options")
def load_without_state(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Ask upstream where the optimizer has kept something."""
    return resume.load_optimizer(wrapped, *args, **kwargs)
