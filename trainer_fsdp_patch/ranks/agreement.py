"""Whether all ranks hold the same, and what one of them has found: as few bytes for 1,024 ranks as for 2.

Nothing gathers objects. These are all places where ranks exchange more than tensors:

| what | function | bytes that a rank gets |
| --- | --- | --- |
| the adapter's make-up, adapters that came later, tensors of the base | `first_difference` | 32 |
| bits of the adapter, after its broadcast, before a save and after a load | `compare` | 32 |
| bits of the frozen base | `differing_rows` | 32 |
| whether a save or a load has failed | `first_failure` | 8 |
| which checkpoint is the last, what it lacks, and an optimizer's settings | `from_main` | 8 and the pickled value |

Where ranks differ the run ends, and more is sent to say why. `first_difference` halves the list of names with 32 bytes
each time, and sends the values of one name. `differing_rows`, which `compare` asks, sends 32 or 48 bytes for each
tensor; so it does where only some ranks have loaded the base. `first_failure` sends one text.

`collectives.meet` is no collective. Ranks wait for a key of each other rank in torch's store, before a save by hand of
sharded tensors and where a batch size is looked for.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from trainer_fsdp_patch import bits
from trainer_fsdp_patch.errors import AdapterError
from trainer_fsdp_patch.ranks.collectives import collective

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")
Item = tuple[int, str, object]

_LARGEST = 2**63 - 1


def first_difference(
    groups: Sequence[Mapping[str, object]], device: torch.device, what: str
) -> tuple[str, int, object, object] | None:
    """The first of some named values that is another one, or "absent", on some rank.

    Args:
        groups: this rank's values; those of the first group come first. Their `repr` tells them apart. Within a group
            the names are sorted, so that the order of a mapping makes no difference.
        device: of the collectives.
        what: for the error.

    Returns:
        Its name, the first rank that differs from rank 0, and the values on rank 0 and there; None where all are alike.

    Raises:
        RankError: another rank has ended.
    """
    import torch.distributed as dist

    items = [(place, name, group[name]) for place, group in enumerate(groups) for name in sorted(group)]
    words = _digest(items)
    if _alike(words, device, what):
        return None
    rank, length = _first_other(words, len(items), device, what)
    # Both lists are alike in the first `same` items, and not in the first `other`. A shorter one is filled up.
    same, other = 0, length
    while other - same > 1:
        middle = (same + other) // 2
        prefix = _digest([*items[:middle], *[None] * (middle - len(items))])
        # All ranks take part, and those that are not compared give numbers that are never the smallest.
        compared = prefix if dist.get_rank() in (0, rank) else None
        same, other = (middle, other) if _alike(compared, device, what) else (same, middle)
    item = items[same] if same < len(items) else None
    return _say(_broadcast(item, 0, what), rank, _broadcast(item, rank, what))


def _say(here: Item | None, rank: int, there: Item | None) -> tuple[str, int, object, object]:
    """What two sorted lists have at the first place where they differ: the smaller name is absent in the other list."""
    if here is None or (there is not None and there[:2] < here[:2]):
        assert there is not None
        return there[1], rank, "absent", there[2]
    if there is None or here[:2] < there[:2]:
        return here[1], rank, here[2], "absent"
    return here[1], rank, here[2], there[2]


def _digest(items: Sequence[object]) -> tuple[int, ...]:
    """16 bytes of a hash, as two words."""
    return struct.unpack("<2q", hashlib.sha256(repr(items).encode()).digest()[:16])


def _alike(words: Sequence[int] | None, device: torch.device, what: str) -> bool:
    """Whether all ranks that give words give the same; one all-reduce of 32 bytes."""
    import torch
    import torch.distributed as dist

    # The largest of a word is the complement of the smallest complement: one reduction finds both.
    both = [_LARGEST] * 4 if words is None else [*words, *(~word for word in words)]
    smallest = torch.tensor(both, dtype=torch.int64, device=device)
    with collective(what):
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    *low, first, second = smallest.tolist()
    return low == [~first, ~second]


def _first_other(words: Sequence[int], length: int, device: torch.device, what: str) -> tuple[int, int]:
    """The first rank whose words are not those of rank 0, and the largest length."""
    import torch
    import torch.distributed as dist

    of_main = torch.tensor(words, dtype=torch.int64, device=device)
    with collective(what):
        dist.broadcast(of_main, src=0)
    here = dist.get_world_size() if of_main.tolist() == list(words) else dist.get_rank()
    smallest = torch.tensor([here, -length], dtype=torch.int64, device=device)
    with collective(what):
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
    rank, shortest = smallest.tolist()
    return rank, -shortest


def _broadcast(value: Value, rank: int, what: str) -> Value:
    import torch.distributed as dist

    values = [value]
    with collective(what):
        dist.broadcast_object_list(values, src=rank)
    return values[0]


def from_main(value: Value, what: str) -> Value:
    """What rank 0 has, on all ranks.

    Args:
        value: this rank's; rank 0's is pickled. It is small, and does not grow with the model.
        what: for the error.

    Raises:
        RankError: another rank has ended.
    """
    return _broadcast(value, 0, what)


def first_failure(said: str, device: torch.device, what: str) -> tuple[int, str] | None:
    """The first rank that has failed, and what it has said; None where none has.

    Args:
        said: this rank's error, or "".
        device: of the collectives.
        what: for the error.

    Raises:
        RankError: another rank has ended.
    """
    import torch
    import torch.distributed as dist

    ranks = dist.get_world_size()
    first = torch.tensor([dist.get_rank() if said else ranks], dtype=torch.int64, device=device)
    with collective(what):
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
    rank = int(first)
    return None if rank == ranks else (rank, _broadcast(said, rank, what))


def compare(names: Sequence[str], tensors: Sequence[torch.Tensor], when: str) -> None:
    """Raise on all ranks where a replicated tensor does not have the same bits everywhere.

    Args:
        names: canonical names, for the message.
        tensors: in the same order on all ranks, on the device of the collectives.
        when: such as "before saving".

    Raises:
        AdapterError: names the first tensor that differs.
    """
    import torch
    import torch.distributed as dist

    if not tensors or dist.get_world_size() == 1:
        return
    table = torch.stack([bits.fingerprint(tensor) for tensor in tensors])
    differing = differing_rows(table, f"comparison of the adapter {when}", lambda low, high: (low != high).any(dim=1))
    if differing:
        name = names[differing[0]]
        raise AdapterError(
            name,
            f"its bits differ between ranks {when}, as do those of {len(differing) - 1} more of {len(names)} tensors",
            "Each rank trains an adapter of its own and one of them would be saved",
            "Step the optimizer on all ranks alike and call backward through the Trainer or Accelerator",
            tensor=name,
        )


def differing_rows(
    table: torch.Tensor, what: str, differ: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> list[int]:
    """Rows of a table that differ between ranks, by their smallest and largest values; most often there are none.

    Args:
        table: int64, [rows, columns], of one shape on all ranks, on the device of the collectives.
        what: for the error.
        differ: which rows do: bool, [rows], from the smallest and the largest values of all ranks, each as `table`.

    Raises:
        RankError: another rank has ended.
    """
    import torch.distributed as dist

    # Sums of fingerprints could cancel. A hash of all of them cannot, and goes by the CPU.
    if _alike(_digest(table.tolist()), table.device, what):
        return []
    low, high = table.clone(), table.clone()
    with collective(what):
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return [int(row) for row in differ(low, high).nonzero().flatten()]
