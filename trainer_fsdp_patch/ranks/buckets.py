"""Flat buffers that the gradients of replicated parameters are averaged in.

After an average each gradient is a view of its bucket's buffer: nothing is copied back. Small buffers are kept, so that
the next average makes no views. A loop that sets gradients to zero, not to None, copies nothing at all.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

TensorType = TypeVar("TensorType", bound="torch.Tensor")

BUCKET_BYTES = 256 * 2**20
"""Largest flat buffer that one collective gets, in bytes; small adapters fit into one."""

KEPT_BYTES = 64 * 2**20
"""Largest buffer that is kept while its parameters have no gradients, in bytes.

A larger one would stand next to the gradients that the next backward pass makes.
"""

_GRADIENT = operator.attrgetter("grad")


def split(tensors: Sequence[TensorType]) -> Iterator[list[TensorType]]:
    """Runs of one dtype and device, none above BUCKET_BYTES unless a single tensor is.

    Args:
        tensors: in the order of all ranks.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[TensorType]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        bucket: list[TensorType] = []
        size = 0
        for tensor in group:
            nbytes = tensor.numel() * tensor.element_size()
            if bucket and size + nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += nbytes
        yield bucket


class Bucket:
    """Parameters of one dtype and device, whose gradients one all-reduce averages.

    Args:
        parameters: the same ones, in the same order, on all ranks.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self.parameters = parameters
        self.sizes = [parameter.numel() for parameter in parameters]
        self.elements = sum(self.sizes)
        # A gradient has the layout and dtype of its parameter, on which optimizers rely. Views are contiguous.
        self._as_views = all(
            parameter.is_contiguous() and getattr(parameter, "grad_dtype", parameter.dtype) == parameter.dtype
            for parameter in parameters
        )
        self._flat: torch.Tensor | None = None
        self._views: list[torch.Tensor] = []
        self._untouched = (0, 0)
        self._made, self._stale = (parameters[0].dtype, parameters[0].device, self.sizes[0]), False

    def holds(self) -> bool:
        """Whether the parameters are still of the dtype, the device and the size that the buffer was made for.

        A cast or a move takes all of a model; of each bucket one parameter is looked at.
        """
        first = self.parameters[0]
        return not self._stale and (first.dtype, first.device, first.numel()) == self._made

    def average(self, reduce: Callable[[torch.Tensor], None], ranks: int) -> torch.Tensor:
        """Average the gradients. Those that autograd made are views of the buffer then.

        Args:
            reduce: sums a tensor up over the ranks, in place.
            ranks: their number.

        Returns:
            The averages, shape [elements]; zero where no rank has a gradient.
        """
        import torch

        with torch.no_grad():
            gradients = list(map(_GRADIENT, self.parameters))
            flat, views, elsewhere = self._room(gradients)
            lacks = any(map(operator.is_, gradients, itertools.repeat(None)))
            missing = [place for place, gradient in enumerate(gradients) if gradient is None] if lacks else []
            if len(elsewhere) == len(views) and not missing:
                # Autograd has made them all, as in each step of a Trainer: no lists are made of the lists.
                torch._foreach_copy_(views, gradients)
            elif here := [place for place in elsewhere if gradients[place] is not None]:
                torch._foreach_copy_([views[place] for place in here], [gradients[place] for place in here])
            # A mask travels behind the gradients: one for each parameter that has a gradient here, else zero.
            # After the sum it is above zero where any rank has one, so that one collective answers both questions.
            # It has the dtype of the gradients. Sums of ones may round in bf16, but never down to zero.
            mask = flat[self.elements :].fill_(1)
            if missing:
                mask[missing] = 0
                torch._foreach_zero_([views[place] for place in missing])
            reduce(flat)
            flat.div_(ranks)
            self._give(gradients, views, elsewhere)
            # Reading the mask waits for the device, so only ranks that lack a gradient do it.
            shares = mask.tolist() if missing else []
            for place in missing:
                if not shares[place] > 0:
                    self.parameters[place].grad = None
        return flat[: self.elements]

    def _room(self, gradients: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, list[torch.Tensor], Sequence[int]]:
        """A buffer, its views, and the places of gradients that are not these views."""
        if self._flat is not None:
            elsewhere = self._elsewhere(gradients)
            # A user may hold what was a gradient, or a view of it, and `zero_grad()` took it off its parameter.
            if not elsewhere or _held(self._flat, self._views, elsewhere) == self._untouched:
                return self._flat, self._views, elsewhere
        flat = self.parameters[0].new_zeros(self.elements + len(self.parameters), requires_grad=False)
        starts = [0, *itertools.accumulate(self.sizes)]
        # Not by `split()`: autograd lets nobody change one of several views of a call in place.
        views = [
            flat.narrow(0, start, size).view(parameter.shape)
            for start, size, parameter in zip(starts, self.sizes, self.parameters, strict=False)
        ]
        if self._as_views and flat.nbytes <= KEPT_BYTES:
            self._flat, self._views, self._untouched = flat, views, _held(flat, views, range(len(views)))
        return flat, views, range(len(views))

    def _elsewhere(self, gradients: Sequence[torch.Tensor | None]) -> Sequence[int]:
        """Places of gradients that are not views of the buffer."""
        if not any(map(operator.is_, gradients, self._views)):
            return range(len(self._views))
        return [place for place, view in enumerate(self._views) if gradients[place] is not view]

    def _give(
        self, gradients: Sequence[torch.Tensor | None], views: Sequence[torch.Tensor], places: Sequence[int]
    ) -> None:
        """Give parameters their averages: as views, or in tensors that a user or another package has put there."""
        import torch

        whole = len(places) == len(views)
        found = gradients if whole else [gradients[place] for place in places]
        own = [gradient for gradient in found if gradient is not None]
        # Autograd's own gradients are no views. Whoever has put in a view reads what it is a view of.
        if self._as_views and not any(map(torch.Tensor._is_view, own)):
            try:
                pairs = zip(self.parameters, views, strict=True) if whole else self._pairs(views, places)
                for parameter, view in pairs:
                    parameter.grad = view
                return
            except RuntimeError:
                # Somebody has cast one parameter alone since the last average. The next one has new buffers.
                self._stale = True
        for place in places:
            parameter, gradient = self.parameters[place], gradients[place]
            parameter.grad = (torch.zeros_like(parameter) if gradient is None else gradient).copy_(views[place])

    def _pairs(
        self, views: Sequence[torch.Tensor], places: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((self.parameters[place], views[place]) for place in places)


class Buckets:
    """The buckets of some parameters, kept from average to average."""

    def __init__(self) -> None:
        self._parameters: list[torch.Tensor] = []
        self._buckets: list[Bucket] = []

    def of(self, parameters: list[torch.Tensor]) -> Sequence[Bucket]:
        """Buckets of these parameters: those of before, where it is the same list of the same ones.

        Args:
            parameters: replicated ones, the same on all ranks and in the same order.
        """
        if parameters is not self._parameters or not all(bucket.holds() for bucket in self._buckets):
            self._parameters, self._buckets = parameters, [Bucket(bucket) for bucket in split(parameters)]
        return self._buckets


def _held(flat: torch.Tensor, views: Sequence[torch.Tensor], places: Sequence[int]) -> tuple[int, int]:
    """How many tensors use the storage of a buffer, and how many objects hold the view in a place that most do."""
    import torch

    counts = list(map(sys.getrefcount, views))
    most = max(counts if len(places) == len(views) else [counts[place] for place in places])
    return torch._C._storage_Use_Count(flat.untyped_storage()._cdata), most
