"""Groups of an optimizer: sharded parameters are stepped apart from full ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer_fsdp_patch.names import canonical
from trainer_fsdp_patch.planning.prepared import prepared_by

if TYPE_CHECKING:
    from transformers import Trainer


def separate(trainer: Trainer) -> None:
    """Give sharded parameters groups of their own: torch steps no group that mixes them with full ones.

    Args:
        trainer: whose optimizer may be made already. Nothing happens where it is not, or where FSDP2 shards nothing
            that is trained.
    """
    prepared, optimizer = prepared_by(trainer), trainer.optimizer
    if prepared is None or optimizer is None or not prepared.sharded_names or prepared.plan.fsdp_version == 1:
        return
    parameters = {canonical(name): item for name, item in trainer.model.named_parameters(remove_duplicate=False)}
    ours = {id(parameters[name]) for name in prepared.sharded_names}
    for group in list(optimizer.param_groups):
        mine = [item for item in group["params"] if id(item) in ours]
        if mine and len(mine) < len(group["params"]):
            group["params"] = [item for item in group["params"] if id(item) not in ours]
            optimizer.add_param_group({**group, "params": mine})
