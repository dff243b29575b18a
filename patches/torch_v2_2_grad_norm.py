"""Gives every rank the same norm of the replicated gradients, which FSDP1 adds in the order of a set.

Area: Training
Issue: https://github.com/pytorch/pytorch/blob/v2.5.0/torch/distributed/fsdp/fully_sharded_data_parallel.py
Can be removed when: no torch release before 2.5 is supported any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.planning import prepared

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(
    __name__,
    versions="torch>=2.2.dev0,<2.5.dev0",
    target="torch.distributed.fsdp.fully_sharded_data_parallel",
    fixed_in="torch 2.5.0",
)


@patch.wrap("_get_grad_norm", "params", "norm_type", only=gates.any_model)
def norm_in_one_order(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Hand over the parameters in the order of the plan, which is that of all ranks."""
    params, *rest = args
    return wrapped(prepared.in_order(params), *rest, **kwargs)
