"""Records what a user sets on the FSDP plugin, so that it wins over the plan or is refused.

Area: Start-up
Issue: https://github.com/huggingface/accelerate/blob/v1.15.0/src/accelerate/utils/dataclasses.py
Can be removed when: accelerate's plugin remembers which of its settings the user gave.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.preparing import fsdp_plugin

if TYPE_CHECKING:
    from accelerate import FullyShardedDataParallelPlugin

    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="accelerate>=0.30.dev0", target="accelerate.utils.dataclasses")


@patch.wrap("FullyShardedDataParallelPlugin.__post_init__", "self", only=None)
def record_explicit_values(
    wrapped: Wrapped, instance: FullyShardedDataParallelPlugin, args: Args, kwargs: Kwargs
) -> object:
    """Look at the fields before defaults and environment fill them."""
    asked = dict(vars(instance))
    result = wrapped(*args, **kwargs)
    fsdp_plugin.remember_arguments(instance, asked)
    return result
