"""Gradients in flat buffers: what is copied, what is kept, and who else may hold a gradient."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from trainer_fsdp_patch.ranks import buckets, collectives
from trainer_fsdp_patch.training import gradients


class Calls(TorchDispatchMode):  # type: ignore[misc]
    """Names of the functions that go through elements of several tensors, or between ranks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().partition("::")[2].partition(".")[0]
        if name in ("cat", "_foreach_copy_", "copy_", "clone", "allreduce_"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def made(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def backward(parameters: list[torch.Tensor], factor: float = 1.0) -> None:
    """Gradients as autograd makes them: products, which are tensors of their own."""
    generator = torch.Generator().manual_seed(3)
    terms = [(item * torch.randn(item.shape, generator=generator).to(item) * factor).sum() for item in parameters]
    torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]


def alone(parameters: list[torch.Tensor], kept: buckets.Buckets) -> list[torch.Tensor]:
    """Average over one rank, which halves: the sum is taken for that of two."""
    for bucket in kept.of(parameters):
        bucket.average(lambda flat: None, 2)
    return [item.grad.clone() for item in parameters if item.grad is not None]


def plainly(parameters: list[torch.Tensor], size: int) -> list[torch.Tensor | None]:
    """The averages of parameters of one dtype by `cat`, an all-reduce and a division."""
    present = [item.grad is not None for item in parameters]
    own = [torch.zeros_like(item) if item.grad is None else item.grad for item in parameters]
    flat = torch.cat([*(item.reshape(-1) for item in own), own[0].new_tensor(present)])
    dist.all_reduce(flat)
    *parts, mask = (flat / size).split([*(item.numel() for item in own), len(own)])
    return [part.view_as(item) if share > 0 else None for part, item, share in zip(parts, own, mask, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_averages_have_the_bits_of_the_plain_ones(dtype: torch.dtype) -> None:
    def work(rank: int) -> Any:
        parameters, kept = made((5, 3), (7,), (2, 2), (1,), dtype=dtype), buckets.Buckets()
        same = []
        for turn in range(4):
            # One parameter has a gradient on some ranks, another on none; later all have one.
            backward([item for place, item in enumerate(parameters) if turn > 1 or place not in (2, rank)], rank + 0.7)
            wanted = plainly(parameters, 3)
            collectives.average_gradients(parameters, [None], kept)
            for item, want in zip(parameters, wanted, strict=True):
                same.append(item.grad is want if want is None or item.grad is None else torch.equal(item.grad, want))
                item.grad = None if turn % 2 else item.grad
        return same

    for same in on_ranks(work, 3):
        assert len(same) == 16
        assert all(same)


def test_one_copy_and_one_collective_and_no_copy_where_gradients_stay() -> None:
    def work(rank: int) -> Any:
        parameters, kept, counted = made((5, 3), (7,)), buckets.Buckets(), []
        for keep in (False, False, True, True):
            for item in parameters:
                if item.grad is not None and keep:
                    item.grad.zero_()
                elif not keep:
                    item.grad = None
            backward(parameters)
            with Calls() as calls:
                collectives.average_gradients(parameters, [None], kept)
            counted.append(calls.names)
        return counted

    for counted in on_ranks(work, 2):
        assert counted == [["_foreach_copy_", "allreduce_"]] * 2 + [["allreduce_"]] * 2


def test_gradients_are_views_of_one_buffer_that_stays_or_goes_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, stays in ((buckets.KEPT_BYTES, True), (0, False)):
        monkeypatch.setattr(buckets, "KEPT_BYTES", limit)
        parameters, kept = made((5, 3), (7,)), buckets.Buckets()
        backward(parameters)
        alone(parameters, kept)
        [storage] = {item.grad.untyped_storage().data_ptr() for item in parameters if item.grad is not None}
        assert parameters[0].grad is not None
        base = weakref.ref(parameters[0].grad._base)
        for item in parameters:
            item.grad = None
        gc.collect()
        assert (base() is not None) == stays
        backward(parameters)
        alone(parameters, kept)
        assert parameters[0].grad is not None
        assert not stays or parameters[0].grad.untyped_storage().data_ptr() == storage


@pytest.mark.parametrize("hold", [lambda item: item.grad, lambda item: item.grad[0], lambda item: item.grad.detach()])
def test_a_gradient_that_a_user_holds_is_not_written_over(hold: Any) -> None:
    parameters, kept = made((5, 3), (7,)), buckets.Buckets()
    backward(parameters)
    alone(parameters, kept)
    held = hold(parameters[0])
    before = held.clone()
    for item in parameters:
        item.grad = None
    backward(parameters, 5.0)
    after = alone(parameters, kept)
    assert torch.equal(held, before)
    assert not torch.equal(hold(parameters[0]), before)
    del held
    for item in parameters:
        item.grad = None
    backward(parameters, 5.0)
    assert all(map(torch.equal, alone(parameters, kept), after))


def test_a_users_own_buffer_of_gradients_gets_the_averages() -> None:
    parameters, kept = made((5, 3), (7,)), buckets.Buckets()
    own = torch.ones(22)
    for _ in range(2):
        parameters[0].grad, parameters[1].grad = own[:15].view(5, 3), own[15:]
        alone(parameters, kept)
    assert own.tolist() == [0.25] * 22


def test_a_layout_that_is_not_contiguous_stays() -> None:
    parameter, kept = torch.nn.Parameter(torch.zeros(3, 4).t()), buckets.Buckets()
    for _ in range(2):
        backward([parameter])
        alone([parameter], kept)
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride() == (1, 4)


@pytest.mark.parametrize("cast", [slice(None), slice(1, 2)], ids=["all", "one"])
def test_a_cast_between_two_averages(cast: slice) -> None:
    parameters, kept = made((5, 3), (7,)), buckets.Buckets()
    backward(parameters)
    alone(parameters, kept)
    for item in parameters:
        item.grad = None
    for item in parameters[cast]:
        item.data = item.data.bfloat16()
    for _ in range(2):
        backward(parameters)
        first = [item.grad.clone() for item in parameters if item.grad is not None]
        averages = alone(parameters, kept)
        assert [item.dtype for item in averages] == [item.dtype for item in parameters]
        assert all(torch.equal(one, other / 2) for one, other in zip(averages, first, strict=True))
        for item in parameters:
            item.grad = None


def test_few_hooks_see_a_pass_and_what_none_has_seen_is_found_before_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradients, "HOOKS", 2)
    parameters = made(*[(2,)] * 6)
    averaging = gradients.Averaging(parameters, lambda: None, lambda: True)
    assert [bool(item._post_accumulate_grad_hooks) for item in parameters] == [True, False, False] * 2
    backward(parameters)
    assert (averaging.averages, averaging.pending) == (1, set())
    assert not averaging.may_be_left(0)
    parameters[1].grad = None
    backward(parameters[1:2])
    assert averaging.may_be_left(1)
    assert averaging.is_left(parameters[1:2])
    parameters[2].grad = None
    assert not averaging.is_left(parameters[2:3])
