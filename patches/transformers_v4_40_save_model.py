"""Writes the adapter file under SHARDED_STATE_DICT too, FSDP2's default until transformers 5.10.

Area: Saving
Issue: https://github.com/huggingface/transformers/issues/30491
Can be removed when: the Trainer writes an adapter file under SHARDED_STATE_DICT, in every supported release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped, argument
from trainer_fsdp_patch.saving import adapter_state, native, writing

if TYPE_CHECKING:
    from transformers import Trainer

patch = Patch(__name__, versions="transformers>=4.40.dev0", target="transformers.trainer")


@patch.wrap("Trainer.save_model", "self", "output_dir", "_internal_call", only=gates.fsdp_trainer)
def write_the_adapter(wrapped: Wrapped, instance: Trainer, args: Args, kwargs: Kwargs) -> object:
    """Write first: the upstream function writes nothing then, and may push the folder. All ranks fail together."""
    with writing.together(instance), adapter_state.saving(instance), native.gathered(instance):
        adapter_state.save_sharded(instance, argument(args, kwargs, 0, "output_dir"))
        return wrapped(*args, **kwargs)
