"""Reads the state of a sharded optimizer by parameter names, as it was saved, instead of by numbers.

Area: Resuming
Issue: https://github.com/huggingface/accelerate/pull/3904
Can be removed when: no accelerate release before 1.13 is supported any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.resuming import optimizer_state

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(
    __name__,
    versions="accelerate>=1.7.dev0,<1.13.dev0",
    target="accelerate.utils.fsdp_utils",
    fixed_in="accelerate 1.13.0",
    witness=("accelerate.utils.fsdp_utils", "load_fsdp_optimizer"),
)


@patch.wrap("_prepare_sd_options", "fsdp_plugin", only=gates.any_model)
def named_state(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Called by the load just before it asks the optimizer what to read into."""
    optimizer_state.answer_by_name()
    return wrapped(*args, **kwargs)
