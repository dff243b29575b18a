"""The line that a run shows when its training starts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from trainer_fsdp_patch.announcing import figures
from trainer_fsdp_patch.planning.plan import REPLICATE, SHARD
from trainer_fsdp_patch.sizes import size

if TYPE_CHECKING:
    from trainer_fsdp_patch.planning.prepared import Prepared

logger = logging.getLogger("trainer_fsdp_patch")


def announce(prepared: Prepared, *, main: bool) -> None:
    """Say once what is sharded and what is full on each rank.

    The line goes through transformers' logging, at the level that a Trainer shows by default. So `log_level="error"`
    and `transformers.logging.set_verbosity_error()` silence it. Details go to the logger `trainer_fsdp_patch`, as info.

    Args:
        prepared: the record of the model that is about to be trained.
        main: whether this is rank 0; no other says anything.
    """
    if prepared.announced or not main:
        return
    prepared.announced = True
    from transformers.utils import logging as theirs

    plan = prepared.plan
    theirs.get_logger("transformers.trainer").warning("trainer_fsdp_patch: %s", line(prepared))
    for reason in (plan.summary(), *plan.reasons, *plan.costs()):
        logger.info("FSDP%d: %s.", plan.fsdp_version, reason)


def line(prepared: Prepared) -> str:
    """One line: what the ranks share, what each holds in full, what it holds in all, and what a step gathers.

    Args:
        prepared: the model's record.
    """
    plan, taken = prepared.plan, figures.taken(prepared)
    shared, full = plan.nbytes(SHARD), plan.nbytes(REPLICATE)
    who = "transformers" if prepared.native else f"FSDP{plan.fsdp_version}"
    said = [f"{who} shards {size(shared)} over {taken.ranks} ranks, {size(full)} is full on each"]
    if taken.ranks == 1:
        said = [f"{who} shards nothing, {size(shared + full)} is full on each rank"]
    if plan.resident:
        said.append(f"{len(plan.resident)} units of the base stay full")
    said.append(f"a rank holds {size(figures.held(plan, taken))} between steps")
    if plan.traffic is not None and plan.ranks > 1:
        times, gathered = plan.traffic
        said.append(f"forward and backward gather {times} units, {size(gathered)}")
    return "; ".join(said)
