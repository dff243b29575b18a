"""Broadcast, averaging and comparison on two and on three real gloo ranks."""

from __future__ import annotations

import os
import signal
from typing import Any

import cells  # noqa: F401
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from trainer_fsdp_patch import bits
from trainer_fsdp_patch.errors import AdapterError
from trainer_fsdp_patch.ranks import agreement, buckets, collectives
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_average_is_over_all_ranks_and_stays_put_when_averaged_again(ranks: int) -> None:
    def work(rank: int) -> Any:
        parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, rank + 1.0)
        made = collectives.average_gradients(parameters, [None])
        first = [parameter.grad.clone() for parameter in parameters]
        collectives.average_gradients(parameters, [None])
        return made, first, [parameter.grad for parameter in parameters]

    for made, first, second in on_ranks(work, ranks):
        assert made == 2
        for gradient, again in zip(first, second, strict=True):
            assert torch.equal(gradient, torch.full_like(gradient, (ranks + 1) / 2))
            assert torch.equal(gradient, again)


def test_a_gradient_that_some_ranks_lack_counts_as_zero_and_one_that_all_lack_stays_away() -> None:
    def work(rank: int) -> Any:
        parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
        parameters[0].grad = torch.ones(2)
        if rank == 0:
            parameters[1].grad = torch.ones(2)
        collectives.average_gradients(parameters, [None])
        return [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]

    assert on_ranks(work, 2) == [[[1.0, 1.0], [0.5, 0.5], None]] * 2


def test_large_adapters_go_in_several_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 40)

    def work(rank: int) -> Any:
        parameters = [torch.nn.Parameter(torch.zeros(4)) for _ in range(5)]
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, float(rank * index))
        return collectives.average_gradients(parameters, [None]), [parameter.grad[0].item() for parameter in parameters]

    assert on_ranks(work, 2) == [(3, [0.0, 0.5, 1.0, 1.5, 2.0])] * 2


def test_broadcast_gives_rank_0s_bits_and_keeps_the_objects() -> None:
    def work(rank: int) -> Any:
        tensors = [
            torch.nn.Parameter(torch.randn(3) + rank),
            torch.tensor([rank, 7]),
            torch.tensor([float("nan"), rank], dtype=torch.bfloat16),
        ]
        objects = [id(tensor) for tensor in tensors]
        collectives.broadcast(tensors)
        agreement.compare(["a", "b", "c"], tensors, "here")
        assert [id(tensor) for tensor in tensors] == objects
        return tensors[1].tolist()

    assert on_ranks(work, 2) == [[0, 7]] * 2


def test_a_difference_is_named_on_all_ranks() -> None:
    def work(rank: int) -> Any:
        swapped = torch.tensor([1.0, 2.0] if rank else [2.0, 1.0])
        try:
            agreement.compare(["same", "swapped"], [torch.ones(2), swapped], "before saving")
        except AdapterError as error:
            return error.tensor, str(error)
        return None

    for name, text in on_ranks(work, 2):
        assert name == "swapped"
        assert text.startswith("swapped: its bits differ between ranks before saving, as do those of 0 more of 2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fingerprints_tell_apart_two_changed_signs(dtype: torch.dtype) -> None:
    """The sign of the last number in a word is its top bit: modulo 2**64 two of them cancelled each other."""
    tensor = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    step = 8 // dtype.itemsize
    for place in (2 * step - 1, 300 * step - 1, 257 * step - 1):
        other = tensor.clone()
        other[[step - 1, place]] *= -1
        assert not torch.equal(bits.fingerprint(tensor), bits.fingerprint(other)), place


def test_fingerprints_tell_apart_signs_of_zero_and_places() -> None:
    tensors = [torch.tensor(values) for values in ([0.0, 1.0], [-0.0, 1.0], [1.0, 0.0])]
    prints = {tuple(bits.fingerprint(tensor).tolist()) for tensor in tensors}
    assert len(prints) == 3
    for dtype in (torch.bool, torch.uint8, torch.float16, torch.float64, torch.int64):
        assert bits.fingerprint(torch.zeros(0, dtype=dtype)).tolist() == [0, 0]


def test_a_rank_that_has_ended_is_said_to_have() -> None:
    def child(rank: int) -> Outcome:
        dist.init_process_group("gloo")
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = torch.ones(2)
        collectives.average_gradients([parameter], [None])
        return Outcome()

    first, _ = forks.launch(child, ranks=2)
    assert first.error.startswith("RankError: average of the adapter's gradients: another rank has ended")
    assert "resume from the last checkpoint" in first.error
