"""torch's fake tensors, which have shapes and no data, in a process that may still be forked afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from trainer_fsdp_patch.shadowing import shadowed


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
