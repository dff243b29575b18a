"""`auto_find_batch_size` under FSDP: after an out-of-memory error the next try trains the model that is wrapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from trainer_fsdp_patch.errors import RankError
from trainer_fsdp_patch.inspecting import inventory
from trainer_fsdp_patch.measuring import footprint
from trainer_fsdp_patch.planning.prepared import prepared_by, prepared_for
from trainer_fsdp_patch.ranks import collectives
from trainer_fsdp_patch.training import steps

if TYPE_CHECKING:
    from torch import nn
    from torch._C._distributed_c10d import Store
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from transformers import Trainer

Result = TypeVar("Result")

PATIENCE = 60.0
"""Seconds that a rank without memory waits for the others to be without it too."""

_MARK = "trainer_fsdp_patch/memory"
"""Key of torch's store under which a rank says that it ran out, and of what batch size."""


def attempt(
    upstream: Callable[[], Result], trainer: Trainer, batch_size: int, relieve: Callable[[nn.Module], None]
) -> Result:
    """One try of the training loop; after one that ran out of memory, FSDP is ready for the next.

    Args:
        upstream: the loop. accelerate calls it again, at a smaller batch size, after the error.
        trainer: whose loop it is.
        batch_size: of this try, for each device.
        relieve: gets the model between two steps, and frees what a run can do without.

    Raises:
        RankError: this rank ran out of memory and others did not, or the other way round.
    """
    from accelerate.utils.memory import should_reduce_batch_size

    try:
        return upstream()
    except Exception as error:
        store = None if prepared_by(trainer) is None else collectives.store()
        if store is None:
            raise
        if should_reduce_batch_size(error):
            _agree(store, batch_size, error)
            _recover(trainer, relieve)
        elif isinstance(error, RuntimeError):
            _look_for_others(store, error)
        raise


def _agree(store: Store, batch_size: int, error: Exception) -> None:
    """Say that this rank ran out of memory, and wait for the others to say so."""
    import torch.distributed as dist

    said = f"rank {dist.get_rank()} ran out of memory at a batch size of {batch_size}"
    # In this order: once all ranks are there, nobody is going to set the mark that rank 0 takes away.
    store.set(_MARK, said)
    others = collectives.missing(f"{_MARK}/together", PATIENCE)
    if others:
        raise _alone(said, others) from error
    if collectives.is_main():
        store.delete_key(_MARK)


def _look_for_others(store: Store, error: RuntimeError) -> None:
    """Blame the rank that ran out of memory, where this one was waiting for it."""
    import torch.distributed as dist

    try:
        said = store.get(_MARK).decode() if store.check([_MARK]) else ""
    except RuntimeError:
        # Rank 0 had the store, and has ended.
        said = ""
    if said:
        raise _alone(said, [dist.get_rank()]) from error


def _alone(said: str, others: list[int]) -> RankError:
    return RankError(
        "auto_find_batch_size",
        f"{said} per device, and rank {', '.join(map(str, others))} did not",
        "Those that did not are inside a step that needs all ranks, so that no smaller batch can be tried",
        "Start again with a smaller per_device_train_batch_size, or give all ranks rows of one length",
    )


def _recover(trainer: Trainer, relieve: Callable[[nn.Module], None]) -> None:
    """Bring FSDP's units to where they are between two steps, after one that was broken off."""
    from torch.distributed.fsdp import FullyShardedDataParallel, _runtime_utils

    prepared, model = prepared_by(trainer), trainer.model
    assert prepared is not None
    averaging = steps.averaging_of(prepared)
    if averaging is not None:
        averaging.forget()
    for module in model.modules():
        # Neither version knows its root before the first forward.
        if isinstance(module, FullyShardedDataParallel):
            # An exception has kept autograd from ending the pass: this is how it would have.
            if module._is_root:
                _runtime_utils._post_backward_final_callback(module, module)
        elif getattr(footprint.state_of(module), "_is_root", False):
            _reset(module)
    for module in model.modules():
        for group in footprint.groups(module):
            _forget_gradients(group)
    model.zero_grad()
    relieve(prepared.model())


def _forget_gradients(group: FSDPParamGroup) -> None:
    """Of full parameters of FSDP2's, which it keeps until it has reduced them; no reset of torch's reaches those."""
    for item in group.fsdp_params:
        if hasattr(item, "_unsharded_param"):
            item._unsharded_param.grad = None
        # until torch 2.15: the sum of several backward passes is kept apart from that gradient
        if not isinstance(getattr(type(item), "unsharded_accumulated_grad", None), property):
            item.unsharded_accumulated_grad = None


def _reset(module: nn.Module) -> None:
    """Bring an FSDP2 root and its units to where they are between two steps."""
    # until torch 2.13
    reset = getattr(module, "reset_iter_state", None)
    if reset is not None:
        reset()
        return
    state = footprint.state_of(module)
    assert state is not None
    state._root_post_backward_final_callback()
    state._state_ctx.iter_forward_root = None
    for part in module.modules():
        reshard = getattr(part, "reshard", None)
        if reshard is not None:
            reshard()


def keep_wrapped(upstream: Callable[..., nn.Module], model: nn.Module, recursive: bool = False) -> nn.Module:
    """The same model, where units would be taken out whose parameters FSDP1 has flattened.

    Without its units the model has shards of flat parameters in the place of its weights.

    Args:
        upstream: transformers' `unwrap_model`.
        model: to unwrap.
        recursive: whether units inside are to be taken out too.
    """
    wrapped = recursive and prepared_for(model) is not None and inventory.fsdp_version(model) == 1
    return model if wrapped else upstream(model, recursive=recursive)
