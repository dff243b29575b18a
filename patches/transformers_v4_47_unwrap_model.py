"""Keeps FSDP1's units in a model that is trained again, by `auto_find_batch_size` or a second `train()`.

Area: Training
Issue: https://github.com/huggingface/transformers/issues/34113
Can be removed when: transformers keeps FSDP1's units, or restores the parameters that it unwraps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.training import batch_size

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="transformers>=4.47.dev0", target="transformers.trainer")


@patch.wrap("unwrap_model", "model", "recursive", only=gates.model())
def leave_units(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Leave the units where the Trainer takes them out one by one: without them the weights are flat shards."""
    return batch_size.keep_wrapped(wrapped, *args, **kwargs)
