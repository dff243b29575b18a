"""Resumes FSDP2 runs from full state dicts of optimizers whose state is empty or quantized.

Area: Resuming
Issue: https://github.com/pytorch/pytorch/blob/v2.9.0/torch/distributed/checkpoint/state_dict.py
Can be removed when: torch loads full optimizer states that are empty or tensor subclasses.
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
    return optimizer.load(wrapped, *args, **kwargs)
