"""Finds the adapter's tensors although nested FSDP and checkpoint wrappers have renamed them.

Area: Saving
Issue: https://github.com/huggingface/peft/pull/3490
Can be removed when: peft removes the names of wrappers before it compares prefixes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.saving import naming

if TYPE_CHECKING:
    from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped

patch = Patch(__name__, versions="peft>=0.21.dev0", target="peft.tuners.tuners_utils")


@patch.wrap("_get_tuner_state_dict_key_prefixes", "model", "adapter_name", only=gates.part())
def canonical_prefixes(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """Hand over the model with the names that state dicts use."""
    return naming.call_with_canonical_names(wrapped, *args, **kwargs)
