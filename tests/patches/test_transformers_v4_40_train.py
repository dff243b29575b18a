"""Before transformers 5.0 `train()` takes further arguments.

What follows from it is tested in test_transformers_v4_40_last_checkpoint.py.
"""

from faults import canary


def test_canary() -> None:
    canary("transformers_v4_40_train")
