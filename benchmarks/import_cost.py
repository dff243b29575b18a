"""What `import trainer_fsdp_patch; patch()` costs a program over `import wrapt`.

    python benchmarks/import_cost.py [--rounds 7] [--most 25]

Each round starts a new interpreter for each line, in turn, with compiled modules at hand. Prints the median wall time
of each and what it costs over `import wrapt`. `patch()` is put off until a target is about to be imported: the fourth
line is what that import pays once. The last is a bare interpreter that `run` has started. Ends with 1 where `patch()`
costs more than `--most` milliseconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from tables import show

from trainer_fsdp_patch.commands import launching

RUN = "bare interpreter, below run"
LINES = {
    "bare interpreter": "pass",
    "import wrapt": "import wrapt",
    "import wrapt, patch()": "import wrapt, trainer_fsdp_patch; trainer_fsdp_patch.patch()",
    "the same, states read": "import wrapt, trainer_fsdp_patch; list(trainer_fsdp_patch.patch())",
    RUN: "pass",
}


def milliseconds(code, environment):
    """Wall time of one new interpreter that runs some code."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    return (time.perf_counter() - start) * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--most", type=float, default=25.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        # Where bytecode is not written, all that is measured is Python's compiler.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = cache
        sides = {name: launching.patched(environment) if name == RUN else environment for name in LINES}
        for name, code in LINES.items():
            milliseconds(code, sides[name])
        rounds = [{name: milliseconds(code, sides[name]) for name, code in LINES.items()} for _ in range(given.rounds)]
    medians = {name: statistics.median(item[name] for item in rounds) for name in LINES}
    over = {name: value - medians["import wrapt"] for name, value in medians.items()}
    rows = [(name, f"{value:.1f}", f"{over[name]:+.1f}") for name, value in medians.items()]
    show(("program", "median ms", "over import wrapt"), rows)
    return int(over["import wrapt, patch()"] > given.most)


if __name__ == "__main__":
    sys.exit(main())
