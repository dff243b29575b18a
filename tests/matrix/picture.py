"""Draws tests/data/matrix.json as a picture: every method and set-up, stock beside patched.

python tests/matrix/picture.py [--json tests/data/matrix.json] [--out tests/data/coverage.png]
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

from cells import SIDES, STATES, Row, state

COLOURS = {"right": "#2e9e5b", "refused": "#e0a526", "wrong": "#c8453a", "no reference": "#d5d8dc", "": "#ffffff"}
DATA = Path(__file__).parent.parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=DATA / "matrix.json")
    parser.add_argument("--out", type=Path, default=DATA / "coverage.png")
    given = parser.parse_args()
    draw(json.loads(given.json.read_text()), given.out)


def draw(rows: list[Row], out: Path) -> None:
    """One square a cell; what is not in the matrix stays white."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    methods, setups = (list(dict.fromkeys(row[name] for row in rows)) for name in ("method", "setup"))
    states = [*STATES, ""]
    figure, panels = pyplot.subplots(1, 2, figsize=(19, 18), sharey=True, layout="constrained")
    for side, panel in zip(SIDES, panels, strict=True):
        grid = [[len(STATES)] * len(setups) for _ in methods]
        for row in rows:
            grid[methods.index(row["method"])][setups.index(row["setup"])] = STATES.index(state(row, side))
        colours = ListedColormap([COLOURS[name] for name in states])
        panel.pcolormesh(grid, cmap=colours, vmin=0, vmax=len(states) - 1, edgecolors="white", linewidth=0.8)
        right = sum(state(row, side) == "right" for row in rows)
        panel.set_title(f"{side}: {right} of {sum('reference' not in row for row in rows)} right", fontsize=14)
        panel.set_xticks([index + 0.5 for index in range(len(setups))], setups, rotation=90, fontsize=8)
        panel.set_yticks([index + 0.5 for index in range(len(methods))], methods, fontsize=8)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    panels[0].invert_yaxis()
    handles = [Patch(color=COLOURS[name], label=name) for name in STATES]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(STATES), fontsize=11)
    figure.savefig(out, dpi=75)


if __name__ == "__main__":
    with warnings.catch_warnings():
        main()
