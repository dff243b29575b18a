"""A quantized base under `cpu_ram_efficient_loading`: each layer leaves the accelerator as soon as it is loaded.

transformers has every rank load a quantized base whole, on its accelerator. Here the first rank of a machine keeps the
bytes in main memory, and the others keep none: FSDP or `restoring` hands them out.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from trainer_fsdp_patch.loading import moving

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_HOOK = "_process_model_after_weight_loading"
"""What a quantizer does to layers once the full base is loaded; transformers calls it from `postprocess_model`."""

_HARMLESS = frozenset(
    {
        "Bnb4BitHfQuantizer",
        "Bnb8BitHfQuantizer",
        "FineGrainedFP8HfQuantizer",
        "QuantoHfQuantizer",
        "TorchAoHfQuantizer",
    }
)
"""transformers' classes whose hook needs no bytes: it does nothing, sets flags, or gives scales another type."""

_LATER = "autoquant"
"""torchao's type that is chosen for each layer once the full base is loaded, in transformers 4.50 to 5.0."""

_LOADED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Layers that were loaded so, on every rank, whether their bytes are here or not."""


def is_asked(quantizer: object) -> bool:
    """Whether a model is loaded for FSDP by one rank of a machine, quantized in a way that allows it.

    Args:
        quantizer: transformers' HfQuantizer, or None.
    """
    if quantizer is None:
        return False
    from transformers.modeling_utils import is_fsdp_enabled

    return bool(is_fsdp_enabled()) and sets_layers(quantizer)


def sets_layers(quantizer: object) -> bool:
    """Whether a quantizer's layers are done once their tensors are set: where its class does nothing to them later.

    What some of transformers' classes do then needs no weight's bytes. Others lay weights out anew for their kernels
    after the full base was loaded. What is dequantized while it is loaded is none of a quantizer's layers. Theirs is
    loaded as transformers does it.

    Args:
        quantizer: transformers' HfQuantizer, of its own or of a program's class.
    """
    from transformers.quantizers import HfQuantizer

    if not isinstance(quantizer, HfQuantizer) or getattr(quantizer.quantization_config, "dequantize", False):
        return False
    hook = _function(quantizer, _HOOK)
    if _function(quantizer, "postprocess_model") is not HfQuantizer.postprocess_model:
        return False
    if hook is getattr(HfQuantizer, _HOOK):
        return True
    upstream = getattr(hook, "__module__", "").startswith("transformers.quantizers.")
    if not upstream or getattr(quantizer.quantization_config, "quant_type", None) == _LATER:
        return False
    return getattr(hook, "__qualname__", "").partition(".")[0] in _HARMLESS


def _function(quantizer: object, name: str) -> object:
    """What a method of an object runs, whether its class or the object itself has it."""
    method = getattr(quantizer, name)
    return getattr(method, "__func__", method)


def settle(model: PreTrainedModel, name: str) -> None:
    """Take a layer off the accelerator, one of whose tensors has been set.

    Args:
        model: that is being loaded.
        name: of the tensor in it; a pattern of several layers' is left alone.
    """
    if "*" in name:
        return
    layer = model.get_submodule(name.rpartition(".")[0])
    tensors = [leaf for leaf in moving.large(layer) if not leaf.tensor.is_meta]
    if moving.is_quantized(layer):
        _LOADED.add(layer)
        if not is_first():
            moving.put(layer, [leaf for leaf in tensors if not moving.is_plain(leaf, layer)], "meta")
            tensors = [leaf for leaf in tensors if moving.is_plain(leaf, layer)]
    moving.put(layer, tensors, "cpu")


def is_first() -> bool:
    """Whether this rank is the first of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def loaded(model: nn.Module) -> list[nn.Module]:
    """Layers of a model that were loaded so, and that nobody has taken over yet; the same on all ranks."""
    return [module for module in model.modules() if module in _LOADED] if _LOADED else []


def forget(layers: Iterable[nn.Module]) -> None:
    """Each rank has the bytes of these layers now, or FSDP has."""
    for layer in layers:
        _LOADED.discard(layer)


def none_loaded() -> bool:
    """Whether no layer waits to be taken over."""
    return not _LOADED
