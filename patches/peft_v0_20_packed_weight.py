"""Lets adapters unpack 4-bit weights that FSDP1 has sharded, as SHiRA and MiSS do in each forward.

Area: Training
Issue: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/quantization_utils.py
Can be removed when: peft reads the quantization state of a 4-bit weight from its layer.
"""

from __future__ import annotations

from trainer_fsdp_patch import gates
from trainer_fsdp_patch.patching.registry import Patch
from trainer_fsdp_patch.patching.wrapping import Args, Kwargs, Wrapped, argument
from trainer_fsdp_patch.preparing import layers

patch = Patch(__name__, versions="peft>=0.20.dev0", target="peft.utils.quantization_utils")


@patch.wrap("Bnb4bitBackend.get_base_weight", "self", "base_layer", only=gates.part("base_layer"))
def unpack_a_sharded_weight(wrapped: Wrapped, instance: object, args: Args, kwargs: Kwargs) -> object:
    """FSDP1's views of a unit lack the attributes of the parameters that they stand for."""
    with layers.packed(argument(args, kwargs, 0, "base_layer")):
        return wrapped(*args, **kwargs)
