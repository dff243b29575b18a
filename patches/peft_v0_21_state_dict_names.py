"""Finds the adapter's tensors although nested FSDP and checkpoint wrappers have renamed them.

Area: Saving
Issue: https://github.com/huggingface/peft/pull/3490
Can be removed when: peft removes the names of wrappers before it compares prefixes.
"""

from __future__ import annotations

from typing import Any

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.saving import naming

patch = Patch(__name__, versions="peft>=0.21.dev0", target="peft.tuners.tuners_utils")


@patch.wrap("_get_tuner_state_dict_key_prefixes", "model", "adapter_name", only=gates.part())
def canonical_prefixes(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand over the model with the names that state dicts use."""
    return naming.call_with_canonical_names(wrapped, *args, **kwargs)
