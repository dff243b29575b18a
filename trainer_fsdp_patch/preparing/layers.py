"""Where an adapter's tensors are when peft computes with them or loads them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.planning.prepared import any_prepared
from trainer_fsdp_patch.shadowing import shadowed

if TYPE_CHECKING:
    import torch
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.vera import VeraLayer
    from torch import nn

_SHARED = ("vera_A", "vera_B")


def is_apart(layer: VeraLayer, arguments: dict[str, object]) -> bool:
    """Whether a VeRA layer's shared projections have another device than its input or another dtype than lambda.

    Args:
        layer: peft's VeRA layer.
        arguments: of its forward, by name.
    """
    device = getattr(arguments.get("x"), "device", None)
    if device is None:
        return False
    dtypes = {adapter: vector.dtype for adapter, vector in layer.vera_lambda_d.items()}
    return any_prepared() or any(
        device != shared.device or shared.dtype != dtypes.get(adapter, shared.dtype)
        for name in _SHARED
        for adapter, shared in getattr(layer, name).items()
    )


def lacks_embedding_parallel(instance: object, arguments: dict[str, object]) -> bool:
    """Whether transformers lacks `EmbeddingParallel`, which peft 0.19 imports where it loads an adapter in a
    distributed run.

    Args:
        instance: None, for the wrapped function is no method.
        arguments: of the call, by name.
    """
    # until peft 0.20
    return versions.at_least("transformers", "5.16.0")


@contextlib.contextmanager
def on_input_device(layer: VeraLayer, x: torch.Tensor) -> Iterator[None]:
    """Show a VeRA layer its slices of the shared projections on the input's device and in lambda's dtype.

    All layers share one pair, which lies where the first layer is. Under device_map or DataParallel the input of
    another layer is elsewhere.

    Args:
        layer: peft's VeRA layer of a linear base layer.
        x: its input, [..., in_features].
    """
    # Under autocast the layer may have copies already, from `casts`.
    if layer.merged or layer.disable_adapters or _SHARED[0] in vars(layer):
        yield
        return
    slices: dict[str, dict[str, torch.Tensor]] = {key: {} for key in _SHARED}
    for adapter in layer.active_adapters:
        if adapter in layer.vera_lambda_d:
            dtype = layer.vera_lambda_d[adapter].dtype
            parts = layer.vera_A[adapter][:, : layer.in_features], layer.vera_B[adapter][: layer.out_features, :]
            for key, part in zip(_SHARED, parts, strict=True):
                slices[key][adapter] = part.to(x.device, dtype)
    with shadowed(layer, **slices):
        yield


@contextlib.contextmanager
def as_buffer(layer: nn.Module, name: str) -> Iterator[None]:
    """Show the plain tensor that FSDP1 has put in place of a parameter as a buffer.

    Args:
        layer: a module.
        name: of its parameter; nothing happens where it still is one.
    """
    gathered = vars(layer).get(name)
    places = [place for place in (vars(layer), layer._parameters) if name in place]
    if gathered is None:
        yield
        return
    for place in places:
        del place[name]
    # Parametrizing writes the tensor onto itself; an alias with a version of its own spares autograd that write.
    layer._buffers[name] = gathered.data
    try:
        yield
    finally:
        layer._buffers.pop(name, None)
        for place in places:
            place[name] = gathered


@contextlib.contextmanager
def packed(layer: Linear4bit) -> Iterator[None]:
    """Show a 4-bit layer's weight as the parameter that knows how to unpack itself, where FSDP1 has a plain tensor.

    Args:
        layer: of bitsandbytes, which keeps the quantization state itself too.
    """
    weight, state = layer.weight, getattr(layer, "quant_state", None)
    if state is None or hasattr(weight, "quant_state"):
        yield
        return
    from bitsandbytes.nn import Params4bit

    known = {"quant_state": state, "quant_type": state.quant_type, "quant_storage": weight.dtype}
    with shadowed(layer, weight=Params4bit(weight.data, requires_grad=False, bnb_quantized=True, **known)):
        yield


def shard_for_tp(
    upstream: Callable[..., object], model: nn.Module, state_dict: dict[str, torch.Tensor], adapter_name: str
) -> object:
    """Shard loaded tensors where transformers split the base's layers, and leave them alone elsewhere.

    Args:
        upstream: peft's `_maybe_shard_state_dict_for_tp`, which changes the state dict in place.
        model: with the adapter.
        state_dict: tensors of an adapter file, by key.
        adapter_name: of the adapter that they are for.
    """
    parts = (getattr(module, "_hf_tp_plan", None) for module in model.modules())
    return upstream(model, state_dict, adapter_name) if any(part is not None for part in parts) else None
