"""Keeps replicated tensors equal on all ranks: broadcast, and averaging of gradients."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from trainer_fsdp_patch import devices
from trainer_fsdp_patch.errors import AdapterError, RankError
from trainer_fsdp_patch.ranks import buckets

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import ProcessGroup, Store


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
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, devices.out_of_memory()):
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


def _flatten(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat([tensor.reshape(-1) for tensor in tensors])
