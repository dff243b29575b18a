"""The states of the patches as a notebook cell or a prompt shows them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trainer_fsdp_patch.patching.registry import Status

ORDER = ("applied", "waiting", "failed", "skipped", "unused")


def summary(states: Iterable[Status]) -> str:
    """How many patches are in each state, such as "31 applied, 12 skipped".

    Args:
        states: of the patches.
    """
    counted = Counter(state.state for state in states)
    return ", ".join(f"{counted[state]} {state}" for state in ORDER if counted[state]) or "no patches"


def concerns(state: Status) -> bool:
    """Whether a patch has to do with what is installed; one that was switched off has.

    Args:
        state: of the patch.
    """
    return state.state != "skipped" or "switched off" in state.reason


class States(list["Status"]):
    """A list of states that is shown as a line for each patch that concerns what is installed, and a summary."""

    def __repr__(self) -> str:
        shown = [state for state in self if concerns(state)]
        width = max((len(state.name) for state in shown), default=0)
        rows = [f"{state.name:<{width}}  {': '.join(filter(None, (state.state, state.reason)))}" for state in shown]
        return "\n".join([*rows, summary(self)])
