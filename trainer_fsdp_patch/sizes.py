"""Bytes as a reader wants them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a number from 1 on, such as "1.5 GiB".

    Args:
        count: bytes.
    """
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
