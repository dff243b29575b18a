"""Loads adapters in distributed runs without the tensor-parallel class that transformers 5.16 removed.

Area: Start-up
Issue: https://github.com/huggingface/peft/blob/v0.20.0/src/peft/utils/save_and_load.py
Can be removed when: no peft release before 0.20 is supported any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.preparing import layers

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(
    __name__,
    versions="peft>=0.19.dev0,<0.20.dev0",
    target="peft.utils.save_and_load",
    fixed_in="peft 0.20.0",
)


@patch.wrap(
    "_maybe_shard_state_dict_for_tp", "model", "state_dict", "adapter_name", only=layers.lacks_embedding_parallel
)
def only_with_a_plan(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Skip the upstream function where no layer is tensor parallel: it would have nothing to do."""
    return layers.shard_for_tp(wrapped, *args, **kwargs)
