"""Tables that the benchmarks print, for a page or for a terminal, and the line that names the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table


def show(heads: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", markdown: bool = False) -> None:
    """Print a table.

    Args:
        heads: of its columns.
        rows: cells of each line.
        title: above it on a terminal.
        markdown: whether it is for a page.
    """
    if markdown:
        print("\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)))
        return
    table = Table(*heads, title=title or None, title_justify="left")
    for cells in rows:
        table.add_row(*cells)
    Console(width=160).print(table)


def machine() -> str:
    """Processor, number of cores and torch's release, in one line."""
    import torch

    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, torch {torch.__version__}"
