"""Lets FSDP1 free a frozen unit before it gathers the next, where it keeps two, or a full decoder's.

Upstream: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_runtime_utils.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.training import releasing

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(
    __name__,
    versions="torch>=2.2.dev0",
    target="torch.distributed.fsdp.fully_sharded_data_parallel",
)


@patch.wrap("_pre_forward", "state", "handle", "unshard_fn", "module", "args", "kwargs", only=gates.part("state"))
def free_before_the_next(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Give a unit of a planned model inputs of its own, by whose gradients FSDP knows that it is done."""
    state, handle, unshard, module, inputs, named = args
    inputs, named = releasing.own_inputs(handle, inputs, named)
    return wrapped(state, handle, unshard, module, inputs, named, **kwargs)
