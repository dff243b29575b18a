"""The loss of a rank where a Trainer counts the tokens of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer_fsdp_patch.prepared import Prepared, prepared_by
from trainer_fsdp_patch.shadowing import shadowed


def compute_loss(
    upstream: Callable[..., Any],
    trainer: Any,
    model: Any,
    inputs: Any,
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Any:
    """Divide the count that the model gets by the ranks, where upstream multiplies the loss that it gives by them.

    Averaging gradients over the ranks divides them once more, so upstream makes up for a loss that was divided by the
    count of all ranks. A loss or a part of one that ignores the count, such as a classifier's or an adapter's penalty,
    must not be multiplied, and this way is not.

    Args:
        upstream: the Trainer's own, bound.
        trainer: whose args say that it counts over all ranks.
        model: as wrapped by FSDP.
        inputs: of the model.
        return_outputs: passed on.
        num_items_in_batch: the count, a scalar tensor or number, or None.

    Returns:
        What upstream returns.
    """
    prepared = prepared_by(trainer)
    if prepared is None or not _multiplies(trainer):
        return upstream(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
    share = _share(prepared, num_items_in_batch, trainer.accelerator.num_processes)
    with shadowed(trainer.args, average_tokens_across_devices=False):
        return upstream(model, inputs, return_outputs=return_outputs, num_items_in_batch=share)


def _multiplies(trainer: Any) -> bool:
    """Whether upstream would; a user's own loss function and a compiled model get the tensor that they expect."""
    args = trainer.args
    others = trainer.compute_loss_func is not None or args.torch_compile or args.n_gpu > 1
    return bool(args.average_tokens_across_devices) and not others


def _share(prepared: Prepared, count: Any, ranks: int) -> float | None:
    """A rank's share as a number, for FSDP rounds tensors; all batches of a step come with one and the same count."""
    if count is None:
        return None
    if prepared.counted[0] is not count:
        prepared.counted = count, float(count) / ranks
    return prepared.counted[1]
