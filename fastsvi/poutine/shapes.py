"""The table of shapes that errors and ``trace.format_shapes()`` show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastsvi.poutine.message import Message

_Row = tuple[list[str], list[str], list[str]]  # label, batch sizes, event sizes


def format_shapes(
    nodes: Mapping[str, Message], title: str = "Trace Shapes:", last_site: str | None = None
) -> str:
    """A table of the shapes of sites up to ``last_site``, params first."""
    if not nodes:
        return title
    rows: list[_Row] = [([title], [], [])]
    rows.append((["Param Sites:"], [], []))
    for name, site in nodes.items():
        if site.type == "param":
            rows.append(([name], _sizes(getattr(site.value, "shape", ())), []))
        if name == last_site:
            break
    rows.append((["Sample Sites:"], [], []))
    for name, site in nodes.items():
        if site.type == "sample":
            rows.extend(_sample_rows(name, site))
        if name == last_site:
            break
    return _align(rows)


def _sample_rows(name: str, site: Message) -> list[_Row]:
    batch, event = (getattr(site.fn, kind, ()) for kind in ("batch_shape", "event_shape"))
    shape = getattr(site.value, "shape", ())
    split = len(shape) - len(event)
    rows = [
        ([name + " dist"], [*_sizes(batch), "|"], _sizes(event)),
        (["value"], [*_sizes(shape[:split]), "|"], _sizes(shape[split:])),
    ]
    if site.log_prob is not None:
        rows.append((["log_prob"], [*_sizes(site.log_prob.shape), "|"], []))
    return rows


def _sizes(shape: Any) -> list[str]:
    return [str(size) for size in shape]


def _align(rows: list[_Row]) -> str:
    """Justify labels and batch sizes to the right, event sizes to the left, cells to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    cells = []
    for label, batch, event in rows:
        cells.append(
            [""] * (widths[0] - len(label)) + label
            + [""] * (widths[1] - len(batch)) + batch
            + event + [""] * (widths[2] - len(event))
        )  # fmt: skip
    cell_widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        " ".join(cell.rjust(width) for cell, width in zip(row, cell_widths, strict=True))
        for row in cells
    )
