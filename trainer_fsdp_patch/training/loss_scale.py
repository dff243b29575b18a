"""The loss of a rank where a Trainer counts the tokens of all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from trainer_fsdp_patch.planning.prepared import Prepared, prepared_by
from trainer_fsdp_patch.shadowing import shadowed

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import Trainer

_COUNT = "num_items_in_batch"

Result = TypeVar("Result")


def compute_loss(upstream: Callable[..., Result], trainer: Trainer, arguments: dict[str, Any]) -> Result:
    """Divide the count that the model gets by the ranks, where upstream multiplies the loss that it gives by them.

    Averaging gradients over the ranks divides them once more. So upstream makes up for a loss that was divided by the
    count of all ranks. A classifier's loss ignores the count and must not be multiplied, nor must an adapter's penalty.
    This way neither is.

    Args:
        upstream: the Trainer's own, bound; it takes the arguments by name.
        trainer: with a planned model, whose args say that it counts over all ranks.
        arguments: of the call, by name; the count is a scalar tensor or number, or absent.

    Returns:
        What upstream returns.
    """
    prepared = prepared_by(trainer)
    assert prepared is not None
    count = arguments.get(_COUNT)
    if count is None or not _multiplies(trainer):
        return upstream(**arguments)
    share = count / trainer.accelerator.num_processes
    with shadowed(trainer.args, average_tokens_across_devices=False), _unrounded(trainer, prepared, share):
        return upstream(**{**arguments, _COUNT: share})


def _multiplies(trainer: Trainer) -> bool:
    """Whether upstream would; a user's own loss function and a compiled model get the count that upstream gives."""
    args = trainer.args
    others = trainer.compute_loss_func is not None or args.torch_compile or args.n_gpu > 1
    return bool(args.average_tokens_across_devices) and not others


@contextlib.contextmanager
def _unrounded(trainer: Trainer, prepared: Prepared, share: float | torch.Tensor) -> Iterator[None]:
    """Let the model's forward get the share itself: FSDP casts floating-point arguments to its low precision.

    A count is a 0-dim tensor upstream. A forward may call `.to(device)` on it, so no plain number stands for it.
    """

    def restore(
        module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        return (args, {**kwargs, _COUNT: share}) if _COUNT in kwargs else None

    # It runs after FSDP's own hooks, which cast. FSDP1 may have checkpointing around all of a model: its forward runs
    # again in the backward pass, when no hook is left, with what checkpointing was given here.
    inner = getattr(trainer.model_wrapped, "_fsdp_wrapped_module", None)
    outermost = prepared.model() if inner is None else inner
    hook = outermost.register_forward_pre_hook(restore, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
