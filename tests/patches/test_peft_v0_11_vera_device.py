"""VeRA's layers share two projections, which lie on one device and in one dtype."""

from typing import Any

import pytest
import torch
from faults import canary
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import trainer_fsdp_patch

NAME = "peft_v0_11_vera_device"


def test_canary() -> None:
    canary(NAME)


def model() -> Any:
    from peft import VeraConfig, get_peft_model

    config = VeraConfig(r=2, target_modules=["0", "1"], projection_prng_key=1)
    return get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config).base_model.model


def spread(layers: Any, inside: FakeTensorMode, first: str, second: str) -> None:
    """Put a layer on each of two devices, as device_map and DataParallel leave them."""
    for layer, device in zip(layers, (first, second), strict=True):
        for module in layer.modules():
            for slots in (module._parameters, module._buffers):
                # The projections stay where the first layer is.
                shared = slots is layers[0].vera_A._buffers or slots is layers[0].vera_B._buffers
                place = first if shared else device
                for key, tensor in list(slots.items()):
                    if tensor is not None:
                        fake = inside.from_tensor(tensor.detach())
                        moved = fake.to(place)
                        slots[key] = nn.Parameter(moved) if isinstance(tensor, nn.Parameter) else moved


class SliceByDispatch(TorchFunctionMode):
    """Slices fake tensors through the dispatcher: a torch without CUDA refuses to index those of fake GPUs."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        tensor, index = args
        for dimension, part in enumerate(index):
            tensor = torch.ops.aten.slice.Tensor(tensor, dimension, part.start, part.stop)
        return tensor


def forward(layers: Any) -> Any:
    hidden = layers[0](torch.ones(3, 4, device="cuda:0"))
    return layers[1](hidden.to("cuda:1"))


def test_another_device() -> None:
    """https://github.com/huggingface/peft/issues/2407"""
    layers = model()
    # Autograd would ask for a real device.
    with FakeTensorMode(allow_non_fake_inputs=True) as inside, torch.no_grad(), SliceByDispatch():
        spread(layers, inside, "cuda:0", "cuda:1")
        with pytest.raises(RuntimeError, match="on the same device, but found at least two devices"):
            forward(layers)
        trainer_fsdp_patch.patch(NAME)
        result = forward(layers)
    assert str(result.device) == "cuda:1"
    assert tuple(result.shape) == (3, 4)


def test_another_dtype() -> None:
    layers = model()
    for layer in layers:
        for vector in (*layer.vera_lambda_d.values(), *layer.vera_lambda_b.values()):
            vector.data = vector.data.bfloat16()
        layer.base_layer.to(torch.bfloat16)
        layer.vera_A["default"] = layer.vera_A["default"].float()
        layer.vera_B["default"] = layer.vera_B["default"].float()
    x = torch.ones(3, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        layers(x)
    trainer_fsdp_patch.patch(NAME)
    assert layers(x).dtype == torch.bfloat16


def test_the_result_and_the_projections_are_those_without_the_patch() -> None:
    layers = model()
    x = torch.randn(3, 4)
    with torch.no_grad():
        layers[0].vera_lambda_b["default"].fill_(1.0)
    before, projections = layers(x), {name: item.clone() for name, item in layers.named_buffers()}
    trainer_fsdp_patch.patch(NAME)
    assert torch.equal(layers(x), before)
    assert not any(key in vars(layer) for layer in layers for key in ("vera_A", "vera_B"))
    for name, item in layers.named_buffers():
        assert torch.equal(item, projections[name])
