"""Makes `generate()` work during training, where FSDP keeps weights sharded and ranks stop at different lengths.

Area: Training
Issue: https://github.com/huggingface/transformers/issues/34530
Can be removed when: transformers runs `generate()` through FSDP's root and keeps the ranks in step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.training import generating

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="accelerate>=0.30.dev0", target="accelerate.accelerator")


@patch.wrap("Accelerator.prepare", "self", "args", "device_placement", only=gates.any_model)
def generate_through_the_root(wrapped: Wrapped, instance: Accelerator, args: Args, kwargs: Kwargs) -> object:
    """Prepare as always, then give planned models a `generate()` that gathers the root unit."""
    result = wrapped(*args, **kwargs)
    generating.enable(instance, result)
    return result
