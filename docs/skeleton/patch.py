"""Clips the values of what is under FSDP: one sentence that begins with a verb, of at most 20 words.

Area: Training
Issue: https://github.com/huggingface/accelerate/issues/1
Can be removed when: accelerate does it, in every supported release.
"""

from __future__ import annotations

from typing import Any

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch

# `fixed_in="accelerate 1.16.0"` follows once upstream has repaired it.
patch = Patch(__name__, versions="accelerate>=0.30.dev0", target="accelerate.accelerator")


@patch.wrap("Accelerator.clip_grad_value_", "self", "parameters", "clip_value", only=gates.any_model)
def what_it_does_instead(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Say what is done before or after the upstream function, and hand over to a module of the engine."""
    return wrapped(*args, **kwargs)
