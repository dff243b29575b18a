"""Quantized parameters whose bytes are elsewhere: of their own class by name, on meta, and copied as what they are."""

from __future__ import annotations

import copy
import functools
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_KIND = "_trainer_fsdp_patch_kind"
"""Attribute of a class of parameters without bytes: the quantizer's own class."""


def of_class(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A tensor that is to another what its quantizer makes of it, and shares what is written on it.

    Args:
        tensor: plain, or a parameter of a quantizer's class; one on meta will do.
        value: plain, of any device; on meta the result is blank.
    """
    import torch

    if type(tensor) is torch.Tensor and not vars(tensor):
        return value
    kind = getattr(tensor, _KIND, type(tensor))
    made: torch.Tensor = torch.Tensor._make_subclass(_blank(kind) if value.is_meta else kind, value)
    made.requires_grad_(tensor.requires_grad)
    made.__dict__ = vars(tensor)
    return made


@functools.cache
def _blank(kind: Any) -> Any:
    """A class of parameters whose copies are without bytes too.

    peft copies a layer to take it to pieces, as for DoRA, and quantizers' own copies go by way of `data`.
    """

    def copied(self: torch.Tensor, memo: dict[int, object]) -> torch.Tensor:
        import torch

        made: torch.Tensor = torch.Tensor._make_subclass(type(self), self.data.clone(), self.requires_grad)
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(vars(self), memo)
        return made

    # Packages know bitsandbytes' weights by the name of their class.
    body = {"__deepcopy__": copied, _KIND: kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return types.new_class(kind.__name__, (kind,), exec_body=lambda space: space.update(body))
