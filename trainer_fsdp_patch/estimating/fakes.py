"""torch's fake tensors, which have shapes and no data: in a process that forks, and for code that reads data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from trainer_fsdp_patch.shadowing import shadowed

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def fake_tensors(*, allow_real: bool = False) -> Iterator[None]:
    """Make every tensor that is made within it a fake one, on a device that is there.

    A build of torch for CUDA on a machine without a GPU would put a guard of one in place, for good. The next backward
    pass starts autograd's threads for it, and ranks that are forked after that cannot run one. No tensor of a plan is
    on CUDA, so that none needs the guard.

    Args:
        allow_real: whether real tensors may take part.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with (
        shadowed(torch._C, _ensureCUDADeviceGuardSet=lambda: None),
        FakeTensorMode(allow_non_fake_inputs=allow_real),
    ):
        yield


def grouped(upstream: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Stands in for transformers' product of rows and experts, whose backward reads how many rows each expert has.

    Args:
        upstream: that product; in bf16 it is torch's own, which fake tensors know.
    """
    import torch

    class Product(torch.autograd.Function):
        """It keeps and makes what the product does, and computes nothing."""

        @staticmethod
        def forward(context: Any, values: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            context.save_for_backward(values, weight)
            context.ends = ends
            return values.new_empty(values.size(0), weight.size(2))

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> Any:
            values, weight = context.saved_tensors
            return torch.empty_like(values), torch.empty_like(weight), None

    def product(values: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        if weight.dtype is torch.bfloat16:
            return upstream(values, weight, offs)
        result: torch.Tensor = Product.apply(values.to(weight.dtype), weight, offs)  # type: ignore[no-untyped-call]
        return result

    return product
