"""The search for the last checkpoint is told of a folder and not of a run.

What follows from it is tested in test_transformers_v4_40_last_checkpoint.py.
"""

from faults import canary


def test_canary() -> None:
    canary("transformers_v5_0_train")
