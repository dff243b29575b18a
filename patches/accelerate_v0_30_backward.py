"""Averages the gradients of the replicated adapter over the ranks, at the end of each backward pass that synchronises.

Area: Training
Issue: https://github.com/huggingface/transformers/pull/48792
Can be removed when: upstream averages the gradients of parameters that FSDP ignores.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.training import steps

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="accelerate>=0.30.dev0", target="accelerate.accelerator")


@patch.wrap("Accelerator.backward", "self", "loss", "kwargs", only=gates.accelerator)
def average_after_backward(wrapped: Wrapped, instance: Accelerator, args: Args, kwargs: Kwargs) -> object:
    """All ranks pass here once per backward; only the last one of an accumulation window averages."""
    return steps.after_backward(functools.partial(wrapped, *args, **kwargs), instance)
