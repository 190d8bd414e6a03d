"""Rows of a comparison as lines of text, without a blank."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from bench.libraries import LIBRARIES

HEADER = (
    f"{'workload':<14}{'P':>5}{'F':>6}  {'library':<15}{'first s':>9}{'cold s':>16}{'warm s':>16}"
    f"{'step us':>26}{'x':>8}{'MB':>7}{'ELBO':>12}{'apart':>7}"
)


def line(row: dict[str, Any], own: dict[str, Any] | None = None) -> str:
    """One row; ``own`` is fastsvi's of the same case. A dash is explained by the note behind it."""
    counted = [r for r in row["repeats"] if r.get("gate") == "passed"]
    elbos = [r["elbo"] for r in row["repeats"] if "elbo" in r]
    cells = [
        f"{row['workload']:<14}{row['particles']:>5}{row['fits']:>6}  {row['library']:<15}",
        f"{_spread(_values(counted, 'first_step_s'), seconds, False):>9}",
        f"{_cold(counted):>16}",
        f"{_warm(row['library'], counted):>16}",
        f"{_spread(steps(counted), microseconds):>26}",
        f"{_ratio(own, counted):>8}",
        f"{_spread(memory(row, counted), '{:.0f}'.format, False):>7}",
        f"{_spread(elbos, '{:.2f}'.format, False):>12}",
        f"{_apart(row):>7}",
    ]
    return "".join(cells) + (f"  {row['note']}" if row["note"] else "")


def steps(repeats: Sequence[dict[str, Any]]) -> list[float]:
    """Microseconds per step of every block of all repeats."""
    return [time for repeat in repeats for time in repeat.get("step_us", ())]


def memory(row: dict[str, Any], repeats: Sequence[dict[str, Any]]) -> list[float]:
    """Peak of the fit, in MB; on a CPU beyond what the imports took."""
    on_cpu = row["device"] == "cpu"
    return [r["peak_mb"] - r["import_mb"] * on_cpu for r in repeats if "peak_mb" in r]


def seconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def microseconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _values(repeats: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [repeat[key] for repeat in repeats if key in repeat]


def _spread(values: list[float], text: Callable[[float], str], ranged: bool = True) -> str:
    """The median, with the range behind it where there is one."""
    if not values:
        return "-"
    middle = text(statistics.median(values))
    if len(values) == 1 or not ranged:
        return middle
    return f"{middle} ({text(min(values))}-{text(max(values))})"


def _cold(repeats: Sequence[dict[str, Any]]) -> str:
    found = _spread(_values(repeats, "fit_cold_s"), seconds)
    return f"~{found}" if any(r.get("extrapolated") for r in repeats) else found


def _warm(library: str, repeats: Sequence[dict[str, Any]]) -> str:
    if repeats and not LIBRARIES[library].caches:
        return "="
    return _spread(_values(repeats, "fit_warm_s"), seconds)


def _ratio(own: dict[str, Any] | None, repeats: Sequence[dict[str, Any]]) -> str:
    """Of median times per step; ``?`` where fastsvi has none that counts."""
    others = steps(repeats)
    mine = steps([r for r in own["repeats"] if r.get("gate") == "passed"]) if own else []
    if not others:
        return "-"
    return f"{statistics.median(mine) / statistics.median(others):.3f}" if mine else "?"


def _apart(row: dict[str, Any]) -> str:
    """The largest of all repeats; ``=`` for NumPyro itself, ``?`` where it has no guide to show."""
    found = [repeat["apart"]["errors"] for repeat in row["repeats"] if "apart" in repeat]
    if found:
        return f"{max(found):.1f}"
    return "=" if row["library"] == "numpyro" else "?"
