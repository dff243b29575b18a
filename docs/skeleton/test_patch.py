"""What a user sees without the patch, in one sentence."""

from cells import Bench, Setup
from faults import canary, fault

NAME = "accelerate_v0_30_skeleton"


def test_canary() -> None:
    canary(NAME)


def test_what_breaks(bench: Bench) -> None:
    """Stock ends with this error, and the patched run equals one process; no error is "": it is wrong in silence."""
    fault(bench, "vera", Setup("f2-skeleton", fsdp=2, amp="bf16"), "to have the same dtype")
