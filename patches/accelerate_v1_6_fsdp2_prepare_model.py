"""Keeps adapters, projections and packed weights out of FSDP2's groups, and the frozen base in its own dtype.

Upstream: https://github.com/huggingface/accelerate/pull/3848
"""

from __future__ import annotations

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped, argument
from trainer_fsdp_patch.preparing import fsdp2

patch = Patch(
    __name__,
    versions="accelerate>=1.6.dev0,<1.13.dev0",
    target="accelerate.accelerator",
    vital=True,
    alongside=("torch_v2_6_fully_shard",),
)


@patch.wrap("fsdp2_prepare_model", "accelerator", "model", only=gates.model())
def shard_the_base_only(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Hide what the plan replicates while accelerate shards, and keep it from casting what is frozen."""
    model = argument(args, kwargs, 1, "model")
    with fsdp2.hide_ignored(model), fsdp2.keep_dtype(model):
        return wrapped(*args, **kwargs)
