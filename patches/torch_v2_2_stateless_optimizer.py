"""Resumes under FSDP2 from full state dicts of optimizers whose state is quantized tensors, or that keep none.

Upstream: https://github.com/pytorch/pytorch/blob/v2.9.0/torch/distributed/checkpoint/state_dict.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.resuming import optimizer

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="torch>=2.2.dev0", target="torch.distributed.checkpoint.state_dict")


@patch.wrap("set_optimizer_state_dict", "model", "optimizers", "optim_state_dict", "options", only=gates.model())
def load_without_state(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Hold what torch cannot broadcast; ask upstream where the optimizer has kept something."""
    return optimizer.load_full(wrapped, *args, **kwargs)
