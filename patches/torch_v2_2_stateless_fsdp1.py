"""Resumes FSDP1 runs whose optimizer keeps no state, or state that is no tensor, such as Adafactor's step.

Area: Resuming
Issue: https://github.com/pytorch/pytorch/blob/v2.9.0/torch/distributed/fsdp/_optim_utils.py
Can be removed when: FSDP1 loads full optimizer states that are empty or no plain tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.resuming import optimizer

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="torch>=2.2.dev0", target="torch.distributed.fsdp.fully_sharded_data_parallel")


@patch.wrap(
    "FullyShardedDataParallel.optim_state_dict_to_load",
    "model", "optim", "optim_state_dict", "is_named_optimizer", "load_directly", "group",
    only=gates.model(),
)  # fmt: skip
def load_without_state(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Hold what is no plain tensor, and say that there is no state where a checkpoint leaves that out."""
    return optimizer.to_load(wrapped, *args, **kwargs)
