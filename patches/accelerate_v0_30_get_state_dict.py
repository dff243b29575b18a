"""Gives a save the full adapter without gathering the frozen base, or an error before a file is replaced.

Upstream: https://github.com/huggingface/accelerate/pull/4206
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped, argument
from trainer_fsdp_patch.saving import adapter_state

if TYPE_CHECKING:
    from accelerate import Accelerator

patch = Patch(__name__, versions="accelerate>=0.30.dev0", target="accelerate.accelerator")


@patch.wrap("Accelerator.get_state_dict", "self", "model", "unwrap", only=gates.saved_model)
def state_dict_of_adapter(wrapped: Wrapped, instance: Accelerator, args: Args, kwargs: Kwargs) -> object:
    """Ask upstream but inside our own save of an adapter, and for 8-bit layers, on which it fails."""
    model = argument(args, kwargs, 0, "model")
    return adapter_state.state_dict(functools.partial(wrapped, *args, **kwargs), instance, model)
