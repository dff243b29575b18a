"""Gives VeRA's layers the shared projections on the device and in the dtype of their input.

Area: Training
Issue: https://github.com/huggingface/peft/issues/2407
Can be removed when: no peft release before 0.14 is supported any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped, argument
from trainer_fsdp_patch.preparing import layers

if TYPE_CHECKING:
    from peft.tuners.vera import VeraLayer

patch = Patch(
    __name__,
    versions="peft>=0.11.dev0,<0.14.dev0",
    target="peft.tuners.vera.layer",
    fixed_in="peft 0.14.0",
)


@patch.wrap("Linear.forward", "self", "x", "args", "kwargs", only=layers.is_apart)
def projections_beside_the_input(wrapped: Wrapped, instance: VeraLayer, args: Args, kwargs: Kwargs) -> object:
    """Show the layer moved copies of its projections for the time of the call."""
    with layers.on_input_device(instance, argument(args, kwargs, 0, "x")):
        return wrapped(*args, **kwargs)
