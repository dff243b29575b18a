"""Keeps adapters, projections and integer-stored weights out of FSDP2's groups and off the meta device.

Upstream: https://github.com/huggingface/accelerate/issues/3983
"""

from __future__ import annotations

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped, argument
from trainer_fsdp_patch.preparing import fsdp2

patch = Patch(
    __name__,
    versions="accelerate>=1.13.dev0",
    target="accelerate.accelerator",
    vital=True,
    alongside=("torch_v2_6_fully_shard",),
)


@patch.wrap("fsdp2_prepare_model", "accelerator", "model", only=gates.model())
def shard_the_base_only(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Hide what the plan replicates while accelerate shards, and put the same objects back."""
    with fsdp2.hide_ignored(argument(args, kwargs, 1, "model")):
        return wrapped(*args, **kwargs)
