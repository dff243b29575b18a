"""Arguments of accelerate's FSDP plugin that a newer transformers gives an accelerate which has none of them."""

from __future__ import annotations

from typing import Any

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.errors import PlanError


class UnknownArgumentError(PlanError, TypeError):
    """FSDP2 is asked of an accelerate that has none; upstream's own error there is a TypeError, which callers catch."""


def as_known(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same request in the words of an accelerate that knows FSDP1 alone.

    `fsdp_version` 1 is what that release does, and FSDP1's `reshard_after_forward` is its `sharding_strategy`:
    https://github.com/huggingface/accelerate/blob/v1.6.0/src/accelerate/utils/dataclasses.py

    Args:
        arguments: keyword arguments of the plugin; they stay as they are.

    Returns:
        A copy where there was something to put in other words, else the arguments themselves.

    Raises:
        UnknownArgumentError: FSDP2 is asked for.
    """
    if not {"fsdp_version", "reshard_after_forward"} & set(arguments):
        return arguments
    known = dict(arguments)
    version = known.pop("fsdp_version", 1)
    if int(1 if version is None else version) != 1:
        raise UnknownArgumentError(
            "fsdp_version",
            f"{version} is asked for, and accelerate {versions.installed('accelerate')} has FSDP1 alone",
            "Nothing was prepared",
            'Install accelerate 1.6 or newer, or set "version": 1 in fsdp_config',
            setting="fsdp_version",
        )
    strategy = known.pop("reshard_after_forward", None)
    if strategy is not None:
        known.setdefault("sharding_strategy", _STRATEGIES.get(strategy, strategy))
    return known


_STRATEGIES = {True: "FULL_SHARD", False: "SHARD_GRAD_OP"}
