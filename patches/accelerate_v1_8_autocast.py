"""Restores the autocast around the forward that accelerate's FSDP2 path lost in 1.8.0.

Area: Training
Issue: https://github.com/huggingface/accelerate/pull/3585
Can be removed when: accelerate puts the forward of FSDP2 models under autocast, in every supported release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.preparing import fsdp2

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="accelerate>=1.8.dev0", target="accelerate.accelerator")


@patch.wrap("Accelerator._prepare_fsdp2", "self", "args", only=gates.any_model)
def autocast_the_forward(wrapped: Wrapped, instance: Accelerator, args: Args, kwargs: Kwargs) -> object:
    """Prepare as always, then do for planned models what FSDP1 and DDP get."""
    result = wrapped(*args, **kwargs)
    fsdp2.autocast_prepared(instance, result)
    return result
