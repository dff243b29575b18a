"""Lets FSDP1 free a frozen unit before it gathers the next one in the backward pass.

FSDP1 frees a unit without trainable parameters when the gradients of its inputs are there, by hooks on these tensors.
The output of one unit is the input of the next. The hook that gathers the earlier unit sits on the same tensor and came
first. So it runs first, and two are gathered at once. All layers of a decoder read what the encoder gave. Such a tensor
has its gradient only when all of them are done. All of them stay gathered until then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.fsdp._flat_param import FlatParamHandle


_PLAIN = (bool, int, float, str, type(None))


def own_inputs(
    handle: FlatParamHandle | None, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Inputs of a frozen unit as views that no other unit has. Each gets its gradient when the unit is done.

    Args:
        handle: of the unit's flat parameter, or None where it has none.
        args: of its forward.
        kwargs: of its forward.

    Returns:
        The same objects where the unit trains something, or takes no gradient.
    """
    import torch
    from torch.utils._pytree import tree_map

    if handle is None or handle.flat_param.requires_grad or not torch.is_grad_enabled():
        return args, kwargs

    def own(item: object) -> object:
        if isinstance(item, torch.Tensor):
            return item.view_as(item) if item.requires_grad else item
        return item

    def inside(item: object) -> object:
        # Most arguments are no structures, and torch takes its time to find out.
        return own(item) if isinstance(item, (*_PLAIN, torch.Tensor)) else tree_map(own, item)

    return tuple(map(inside, args)), {name: inside(item) for name, item in kwargs.items()}
