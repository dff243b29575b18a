"""Averages an adapter next to a natively sharded base in one all-reduce, and not tensor by tensor.

Upstream: https://github.com/huggingface/transformers/pull/48873
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="transformers>=5.19.dev0", target="transformers.trainer")


@patch.wrap("Trainer._sync_replicated_trainable_parameters", "self", "model", only=gates.trainer)
def leave_it_to_the_plan(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Skip the upstream function for planned models: they are broadcast already and averaged after backward."""
    return None
