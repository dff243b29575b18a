"""What ranks agree on, on real gloo ranks: the answers of a gather of everything, for a few bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cells  # noqa: F401
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from trainer_fsdp_patch import bits
from trainer_fsdp_patch.errors import AdapterError
from trainer_fsdp_patch.ranks import agreement

CPU = torch.device("cpu")
Group = Mapping[str, object]


def by_gathering(groups: Sequence[Group]) -> tuple[str, int, object, object] | None:
    """The same question, answered from all values of all ranks."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, groups)
    first, *others = everyone
    for rank, other in enumerate(others, 1):
        for ours, theirs in zip(first, other, strict=True):
            for name in sorted({*ours, *theirs}):
                here, there = ours.get(name, "absent"), theirs.get(name, "absent")
                if here != there:
                    return name, rank, here, there
    return None


def altered(names: list[str]) -> Iterator[Group]:
    """What another rank may hold in place of these names: each in turn altered or missing, more, fewer, none."""
    same = dict.fromkeys(names, 1)
    yield same
    yield dict(reversed(same.items()))
    yield {}
    for place, name in enumerate(names):
        yield {**same, name: 2}
        yield {other: 1 for other in names if other != name}
        yield {**same, f"{name}+": 1}
        yield dict.fromkeys(names[:place], 1)
        yield dict.fromkeys(names[place:], 3)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_first_difference_is_that_of_a_gather(ranks: int) -> None:
    def work(rank: int) -> Any:
        wrong, found = [], 0
        for count in (0, 1, 2, 3, 7, 8):
            names = [f"tensor {place}" for place in range(count)]
            for place, other in enumerate(altered(names)):
                # Each rank but the first is the one that differs, in turn; the last may differ in another way.
                turn = 1 + place % (ranks - 1)
                mine = [other if rank == turn else dict.fromkeys(names, 1), {"a": 2 if rank == ranks - 1 else 1}]
                answers = agreement.first_difference(mine, CPU, "test"), by_gathering(mine)
                wrong += [] if answers[0] == answers[1] else [answers]
                alone = agreement.first_difference(mine[:1], CPU, "test"), by_gathering(mine[:1])
                wrong += [] if alone[0] == alone[1] else [alone]
                found += alone[0] is not None
        return wrong, found

    for wrong, found in on_ranks(work, ranks):
        assert wrong == []
        assert found > 50


def test_values_come_as_they_are_and_their_order_makes_no_difference() -> None:
    def work(rank: int) -> Any:
        kinds = {"b": (torch.bfloat16 if rank else torch.float32, (2, 3)), "a": 1}
        return (
            agreement.first_difference([kinds], CPU, "test"),
            agreement.first_difference([{"x": 1, "y": 2} if rank else {"y": 2, "x": 1}], CPU, "test"),
            agreement.first_difference([{"x": "1" if rank else 1}], CPU, "test"),
        )

    expected = (("b", 1, (torch.float32, (2, 3)), (torch.bfloat16, (2, 3))), None, ("x", 1, 1, "1"))
    assert on_ranks(work, 2) == [expected] * 2


def test_the_main_rank_is_heard_and_the_first_failure() -> None:
    def work(rank: int) -> Any:
        return (
            agreement.from_main((rank, "main"), "test"),
            agreement.first_failure("", CPU, "test"),
            agreement.first_failure(f"rank {rank}" if rank else "", CPU, "test"),
        )

    assert on_ranks(work, 3) == [((0, "main"), None, (1, "rank 1"))] * 3


def test_differences_that_cancel_in_a_sum_are_seen() -> None:
    """Fingerprints are sums. Two tensors whose fingerprints differ by 2**63 would have one sum for both."""

    def work(rank: int) -> Any:
        sign = -0.0 if rank else 0.0
        tensors = [torch.tensor([0.0, sign]), torch.tensor([0.0, sign])]
        prints = torch.stack([bits.fingerprint(tensor) for tensor in tensors])
        try:
            agreement.compare(["one", "two"], tensors, "here")
        except AdapterError as error:
            return prints.tolist(), error.tensor, "1 more of 2" in str(error)
        return None

    first, second = on_ranks(work, 2)
    assert first[1:] == second[1:] == ("one", True)
    assert first[0] != second[0]
