"""Which patches a user leaves out, by their names."""

from __future__ import annotations

import difflib

from trainer_fsdp_patch.errors import message, warn_in_import
from trainer_fsdp_patch.patching.awaiting import DISABLE

ALL = frozenset({"*", "all"})
"""What leaves out every patch."""


def left_out(names: str) -> set[str]:
    """Names of patches to leave out; a name that no patch has gets a warning.

    Args:
        names: separated by commas.

    Returns:
        All names where one of them is of `ALL`.
    """
    from trainer_fsdp_patch.patching import registry

    given = {name.strip() for name in names.split(",")} - {""}
    known = set(registry.discover())
    if given & ALL:
        return known
    for name in sorted(given - known):
        nearest = difflib.get_close_matches(name, known, n=1)
        remedy = f"Did you mean {nearest[0]}" if nearest else "`python -m trainer_fsdp_patch status --all` has all"
        warn_in_import(message(DISABLE, f"no patch is named {name}", "It leaves nothing out", remedy))
    return given
