"""Numbers as people read them."""

from __future__ import annotations


def figure(value: float) -> str:
    """Three digits, or all of a large number.

    >>> figure(0.01234), figure(12.345), figure(3926.8)
    ('0.0123', '12.3', '3,927')
    """
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def size(num_bytes: float) -> str:
    """Bytes with a unit.

    >>> size(16), size(32_800), size(4.8e7)
    ('16 B', '32.8 kB', '48 MB')
    """
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{figure(num_bytes)} {unit}"
        num_bytes /= 1000
    return f"{figure(num_bytes)} GB"
