"""A base that transformers shards itself while it loads it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from trainer_fsdp_patch.planning.prepared import prepared_by, prepared_for
from trainer_fsdp_patch.saving import adapter_state

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer


@contextlib.contextmanager
def gathered(trainer: Trainer) -> Iterator[None]:
    """Around a save of a base that transformers sharded itself: the model answers with what all ranks have proven.

    Args:
        trainer: any; nothing happens where transformers did not shard.
    """
    prepared = prepared_by(trainer)
    if prepared is None or not prepared.native:
        yield
        return
    with adapter_state.gathered(prepared.model(), trainer.accelerator.get_state_dict(trainer.model)):
        yield


def prepare_model(upstream: Callable[..., nn.Module], model: nn.Module, *args: object, **kwargs: object) -> nn.Module:
    """Keep DDP away from a base that transformers sharded itself, as its own releases from 5.19 on do.

    Args:
        upstream: accelerate's `prepare_model`, bound.
        model: a planned one.
        *args: for upstream.
        **kwargs: for upstream.
    """
    prepared = prepared_for(model)
    assert prepared is not None
    if not prepared.native:
        return upstream(model, *args, **kwargs)
    return upstream(model, device_placement=False, evaluation_mode=True)
