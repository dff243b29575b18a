"""What a run takes of a rank beyond its plan, or beyond stock."""

from __future__ import annotations

import dataclasses

from trainer_fsdp_patch.measuring.footprint import Footprint

_SAID = {
    "units": "FSDP units hold the base",
    "gathered": "bytes of parameters are gathered at once",
    "rest": "bytes of parameters are held between steps",
    "base": "bytes of the base are held between steps",
    "replicated": "bytes of the base are full on each rank",
    "sharded": "bytes of the base are held in shards",
    "collectives": "collectives are in a step",
}


def fault(ours: Footprint, planned: Footprint | None, stock: Footprint | None) -> str:
    """What a patched run takes beyond its plan, or beyond stock, in one sentence; "" where it is nothing.

    Between steps, stock is compared with the shards of the base alone. The plan replicates an adapter, projections and
    packed weights for reasons of its own. So they are compared with the plan. Gathered bytes are compared in all: what
    is replicated is gathered nowhere. It is in no unit either. Where layers share their weights, these are replicated,
    and the plan alone says how many units there are.

    Args:
        ours: of the patched run.
        planned: by its plan.
        stock: of the same run without patches, where that came as far as a step.
    """
    for other, whose, names in (
        (planned, "the plan says", ("units", "gathered", "replicated", "base", "rest")),
        (_unpacked(stock, ours), "stock has", ("units", "gathered", "sharded", "collectives")),
    ):
        for name in names if other is not None else ():
            if name == "units" and other is not planned and ours.replicated:
                continue
            taken, wanted = getattr(ours, name), getattr(other, name)
            if taken is None or wanted is None or taken == wanted or (taken < wanted) != (name == "units"):
                continue
            return f"{taken} {_SAID[name]}, {whose} {wanted}"
    return ""


def _unpacked(stock: Footprint | None, ours: Footprint) -> Footprint | None:
    """What stock would take if it sharded the quantized bytes that it has full on each rank, and ours has not.

    A rank holds its share of them, and a unit gathers them: at most all of them at once.
    """
    if stock is None:
        return None
    spared = stock.replicated + stock.statistics - ours.replicated - ours.statistics
    if spared <= 0:
        return stock
    gathered = None if stock.gathered is None else stock.gathered + spared
    # What aligns the parts of a layer is at most a fiftieth of them.
    share = -(-spared * 51 // (50 * ours.ranks))
    return dataclasses.replace(stock, base=stock.base + share, gathered=gathered)
