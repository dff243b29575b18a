"""Resumes plain SGD under FSDP1 with sharded state dicts, of which nothing but the settings has been written.

Upstream: https://github.com/pytorch/pytorch/blob/v2.9.0/torch/distributed/fsdp/_optim_utils.py
"""

from __future__ import annotations

from typing import Any

from trainer_fsdp_patch import resume
from trainer_fsdp_patch.registry import Patch

patch = Patch(__name__, versions="torch>=2.2.dev0", target="torch.distributed.fsdp.fully_sharded_data_parallel")


@patch.wrap(
    "FullyShardedDataParallel.optim_state_dict_to_load",
    "model", "optim", "optim_state_dict", "is_named_optimizer", "load_directly", "group",
)  # fmt: skip
def load_without_state(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Say that there is no state, where a checkpoint leaves that out."""
    return resume.optimizer_to_load(wrapped, *args, **kwargs)
