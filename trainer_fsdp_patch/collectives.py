"""Keeps replicated tensors equal on all ranks: broadcast, comparison, averaging of gradients."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from trainer_fsdp_patch import bits, buckets
from trainer_fsdp_patch.errors import AdapterError, RankError

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import ProcessGroup, Store

Value = TypeVar("Value")

_FAILURE = "trainer_fsdp_patch/failure"
"""Key of torch's store for the error of a rank that failed."""

_MEETING = "trainer_fsdp_patch/meeting"
"""Key of torch's store for ranks that wait for all others."""

_VISITS: Counter[str] = Counter()
"""How often all ranks have met at a place."""

PATIENCE = 300.0
"""Seconds that a rank waits for the others before collectives that one rank alone may have asked for."""


@contextlib.contextmanager
def collective(what: str) -> Iterator[None]:
    """Around collectives: says what was lost where another rank has ended.

    Args:
        what: such as "average of the adapter's gradients".

    Raises:
        RankError: torch's own error, or its process-group timeout, with what to do.
    """
    import torch

    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        cause = _first_failure() or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RankError(
            what,
            f"another rank has ended or does not answer ({cause})",
            "This rank stops too; what was saved before is untouched",
            "See the log of the rank that ended first, and resume from the last checkpoint",
        ) from error


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Around what all ranks do: one that fails leaves its error where those that wait for it read it.

    Without this the last line of a log is of a rank that was waiting. It says nothing of the cause.
    """
    import torch.distributed as dist

    try:
        yield
    except RankError:
        raise
    except Exception as error:
        kept = store() if dist.is_initialized() else None
        if kept is not None:
            with contextlib.suppress(RuntimeError):
                kept.set(_FAILURE, f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
        raise


def _first_failure() -> str:
    """What a rank that failed has said, or ""; rank 0's store may have gone with it."""
    import datetime

    kept = store()
    if kept is None:
        return ""
    try:
        kept.wait([_FAILURE], datetime.timedelta(seconds=1))
        return str(kept.get(_FAILURE).decode()).strip().rstrip(".")
    except RuntimeError:
        return ""


def store() -> Store | None:
    """Torch's own store of the process group, or None."""
    from torch.distributed import distributed_c10d

    get = getattr(distributed_c10d, "_get_default_store", None)
    default: Store | None = None if get is None else get()
    return default


def meet(subject: str, found: str, consequence: str, remedy: str) -> None:
    """Before collectives that a program may have asked for on one rank alone: wait until all ranks are here.

    Args:
        subject: of the error.
        found: why all ranks are needed.
        consequence: what was spared.
        remedy: what to do.

    Raises:
        AdapterError: a rank has not come in `PATIENCE` seconds.
    """
    if missing(_MEETING, PATIENCE):
        raise AdapterError(subject, f"{found} in {PATIENCE:g} s", consequence, remedy)


def missing(place: str, patience: float) -> list[int]:
    """Ranks that have not come to a place of the program, which this one has come to and waits at.

    Args:
        place: key of torch's store.
        patience: seconds to wait for all of them.

    Returns:
        Nothing where all are here. Who comes later waits in its turn, and does not find this rank gone.
    """
    import datetime

    import torch.distributed as dist

    kept = store() if dist.is_initialized() else None
    if kept is None:
        return []
    # Keys stay in the store. The number of the visit keeps a second meeting from finding those of the first.
    keys = [f"{place}/{_VISITS[place]}/{rank}" for rank in range(dist.get_world_size())]
    kept.set(keys[dist.get_rank()], "here")
    try:
        kept.wait(keys, datetime.timedelta(seconds=patience))
    except RuntimeError:
        absent = [rank for rank, key in enumerate(keys) if not kept.check([key])]
        # This rank is about to leave, and who comes later must not take it for present.
        kept.delete_key(keys[dist.get_rank()])
        return absent
    _VISITS[place] += 1
    return []


def is_main() -> bool:
    """Whether this is the first rank, or no rank of many."""
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Give every rank the bits of rank 0, in place.

    Args:
        tensors: the same ones, in the same order, on all ranks; any dtype, on the collectives' device.
    """
    import torch
    import torch.distributed as dist

    for bucket in buckets.split([tensor.detach() for tensor in tensors]):
        flat = _flatten(bucket)
        with collective("broadcast of the adapter"):
            dist.broadcast(flat, src=0)
        for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def average_gradients(
    parameters: Sequence[torch.Tensor],
    groups: Sequence[ProcessGroup | None],
    kept: buckets.Buckets | None = None,
    see: Callable[[torch.Tensor], None] | None = None,
) -> int:
    """Average the gradients of replicated parameters over the data-parallel ranks.

    A parameter without a gradient on this rank counts as zero where another rank has one. So all ranks pass the same
    collectives, and step alike. Averages stay put when averaged again.

    Args:
        parameters: replicated parameters, the same on all ranks and in the same order.
        groups: process groups to average over, one after the other; `[None]` is the world.
        kept: buffers of the averages before; None is none.
        see: gets the averages of each buffer, flat.

    Returns:
        Number of collectives.
    """
    import torch.distributed as dist

    size = 1
    for group in groups:
        size *= dist.get_world_size(group)

    def reduce(flat: torch.Tensor) -> None:
        with collective("average of the adapter's gradients"):
            for group in groups:
                dist.all_reduce(flat, group=group)

    used = (kept or buckets.Buckets()).of(parameters if isinstance(parameters, list) else list(parameters))
    for bucket in used:
        averages = bucket.average(reduce, size)
        if see is not None:
            see(averages)
    return len(used) * len(groups)


def compare(names: Sequence[str], tensors: Sequence[torch.Tensor], when: str) -> None:
    """Raise on all ranks where a replicated tensor does not have the same bits everywhere.

    Args:
        names: canonical names, for the message.
        tensors: in the same order on all ranks.
        when: such as "before saving".

    Raises:
        AdapterError: names the first tensor that differs.
    """
    import torch
    import torch.distributed as dist

    if not tensors or dist.get_world_size() == 1:
        return
    # All are equal where the smallest equals the largest. Two reductions take as many bytes on any number of ranks.
    prints = torch.stack([bits.fingerprint(tensor) for tensor in tensors])
    low, high = prints.clone(), prints
    with collective(f"comparison of the adapter {when}"):
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
    differing = (low != high).any(dim=1).nonzero().flatten().tolist()
    if differing:
        name = names[differing[0]]
        raise AdapterError(
            name,
            f"its bits differ between ranks {when}, as do those of {len(differing) - 1} more of {len(names)} tensors",
            "Each rank trains an adapter of its own and one of them would be saved",
            "Step the optimizer on all ranks alike and call backward through the Trainer or Accelerator",
            tensor=name,
        )


def all_gather_object(value: Value, what: str) -> list[Value]:
    """A value of each rank, which all ranks get.

    Args:
        value: this rank's; it is pickled.
        what: for the error.

    Raises:
        RankError: another rank has ended.
    """
    import torch.distributed as dist

    # torch writes over each of the places.
    values = [value] * dist.get_world_size()
    with collective(what):
        dist.all_gather_object(values, value)
    return values


def first_difference(items: Mapping[str, object], what: str) -> tuple[str, int, object, object] | None:
    """The first of some named values that is another one, or "absent", on some rank.

    Args:
        items: this rank's; they are pickled.
        what: for the error.

    Returns:
        Its name, that rank, and the values on rank 0 and there; None where all are alike.

    Raises:
        RankError: another rank has ended.
    """
    first, *others = all_gather_object(items, what)
    for rank, other in enumerate(others, 1):
        for name in (*first, *other):
            here, there = first.get(name, "absent"), other.get(name, "absent")
            if here != there:
                return name, rank, here, there
    return None


def any_rank(flag: bool, device: torch.device, what: str) -> bool:
    """Whether a flag is set on any rank.

    Args:
        flag: this rank's.
        device: of the collectives.
        what: for the error.

    Raises:
        RankError: another rank has ended.
    """
    import torch
    import torch.distributed as dist

    highest = torch.tensor(int(flag), device=device)
    with collective(what):
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return bool(highest)


def _flatten(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat([tensor.reshape(-1) for tensor in tensors])
