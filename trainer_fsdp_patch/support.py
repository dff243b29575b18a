"""The support window: which releases, the oldest and the newest, and the stacks between them that are trained.

It is said here alone. `versions` reads it, noxfile.py runs this file without importing the package, and
`python tests/programs/window.py` writes docs/releases.md from it. Tests compare setup.cfg and README.
"""

from __future__ import annotations

OLDEST = {
    "python": "3.10",
    "torch": "2.2.0",
    "transformers": "4.40.0",
    "accelerate": "0.30.0",
    "peft": "0.11.0",
}
"""Oldest release of each package that is supported."""

PINNED = {
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "accelerate": "1.15.0",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
}
"""Releases of the test extra: the full matrix and all tests run on these."""

OLDEST_PYTHON = {"transformers": "5.20.2"}
"""What the test extra takes on the oldest Python, which the pinned release does not support: the newest that does."""

NEWEST = {**PINNED, "python": "3.13", "torch": "2.15.0"}
"""Newest release of each package that all tests were run on, next to the pinned ones of the others.

Of Python it is the newest that `check` and a part of the tests were run on.
"""

CHECKED = {"torch": ["2.14.1"]}
"""Releases on which `check` was run and is right, and not all of the tests."""

STACKS = [
    ("4.40.0", "0.30.0", "0.11.0"),  # oldest; VeRA is new
    ("4.44.2", "0.33.0", "0.12.0"),  # adapters in fp32 beside a bf16 base
    ("4.46.3", "1.1.1", "0.13.2"),  # the loss is divided by the tokens of all ranks
    ("4.48.3", "1.2.1", "0.14.0"),  # VeRA on packed weights
    ("4.50.3", "1.5.2", "0.15.0"),  # PEFT's wrap policy for every method; auxiliary wrappers
    ("4.51.3", "1.6.0", "0.15.2"),  # FSDP2, sharded checkpoints only
    ("4.53.3", "1.8.1", "0.16.0"),  # FSDP2 by a path of its own; RandLora
    ("4.55.4", "1.10.1", "0.17.1"),  # prefixes of auxiliary wrappers
    ("4.57.6", "1.12.0", "0.18.1"),  # last 4.x
    ("5.1.0", "1.7.0", "0.18.1"),  # the plugin is made from arguments; first full FSDP2 checkpoints
    ("5.3.0", "1.12.0", "0.18.1"),  # update_fsdp_plugin_peft
    ("5.9.0", "1.13.0", "0.19.1"),  # last whose default is FSDP1; the upcast does nothing
    ("5.14.1", "1.14.0", "0.20.0"),  # transformers.distributed
    ("5.17.0", "1.14.0", "0.19.1"),  # EmbeddingParallel is gone
    ("5.19.0", "1.14.0", "0.21.1"),  # peft finds tensors by prefix
    ("5.20.2", "1.5.2", "0.19.0"),  # asks for FSDP2's arguments where accelerate has none
    ("5.24.0", "1.15.0", "0.21.2"),  # newest
]
"""transformers, accelerate and peft: the oldest, each turn of the code that the patches wrap, the newest."""

IN_CI = [STACKS[0], STACKS[6]]
"""Stacks that `.ci/run` adds to the newest."""

TORCHES = {"2.2.2": STACKS[0], "2.4.1": STACKS[2], "2.6.0": STACKS[5], "2.9.1": STACKS[8]}
"""Other torch releases, and the stack that each is trained with."""
