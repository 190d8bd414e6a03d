"""The pictures of :mod:`bench.report`.

Times spread over five orders of magnitude, so their axes are logarithmic. There the length of a bar
says nothing, as it depends on where the axis begins; a mark on a line for each workload says where
a time lies. Colours are those of Okabe and Ito, told apart by everybody; shapes differ too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.report import LABELS, Results, Row, cases, cold_s, has_fits, stem, step_us, title, warm_s

# Library: colour and marker. fastsvi is drawn last, largest and in black.
STYLES = {
    "fastsvi": ("#000000", "D"),
    "numpyro": ("#D55E00", "o"),
    "torch-compiled": ("#0072B2", "^"),
    "torch": ("#56B4E9", "v"),
    "pyro": ("#009E73", "s"),
    "pyro-jit": ("#CC79A7", "P"),
    "fastsvi-eager": ("#999999", "d"),
}
OPERATIONS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999999",
)
GREY, LIGHT = "#555555", "#DDDDDD"
WIDTH, DPI = 8.5, 160

AXES = {
    "elements": "elements D of normal means",
    "particles": "particles P, eight schools",
    "fits": "regressions F, all in one step",
    "threads": "threads, a million normal means",
}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.labelcolor": GREY,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.dpi": DPI,
    "savefig.facecolor": "white",
}


def names(results: Results) -> list[str]:
    """File names of the pictures that :func:`paint` makes, in order."""
    return [name for name, _ in _pictures(results)]


def paint(results: Results, folder: Path) -> Iterator[Path]:
    """Draw every picture for which there are results; gives the paths written."""
    import matplotlib
    from matplotlib.figure import Figure

    for name, draw in _pictures(results):
        with matplotlib.rc_context(STYLE):
            figure = Figure(layout="constrained")
            draw(figure)
            path = folder / name
            # No date and no version inside: the same results give the same bytes.
            figure.savefig(path, metadata={"Software": None})
        yield path


def _pictures(results: Results) -> list[tuple[str, Callable[[Any], None]]]:
    found: list[tuple[str, Callable[[Any], None]]] = []
    for file, document in results.compare:
        first = stem(file, document)
        found.append((f"{first}-steps.png", lambda f, d=document: _steps(f, d)))
        if has_fits(document):
            found.append((f"{first}-fits.png", lambda f, d=document: _fits(f, d)))
    for file, document in results.scaling:
        first = stem(file, document)
        found.append((f"{first}-scaling.png", lambda f, d=document: _scaling(f, d)))
    for file, document in results.kernels:
        first = stem(file, document)
        found.append((f"{first}-kernels.png", lambda f, d=document: _kernels(f, d)))
    # Two documents of one kind and device: the first is drawn.
    return list(dict(reversed(found)).items())[::-1]


# ------------------------------------------------------------------------------ beside the peers


def _steps(figure: Any, document: dict[str, Any]) -> None:
    axes = figure.subplots()
    libraries = _marks(axes, document, step_us)
    axes.set_title("Time per step: further left is faster")
    axes.set_xlabel("microseconds per step")
    _finish(figure, document, libraries)


def _fits(figure: Any, document: dict[str, Any]) -> None:
    cold, warm = figure.subplots(1, 2, sharey=True, sharex=True)
    libraries = _marks(cold, document, cold_s)
    cold.set_title("Time to fit, caches empty")
    cold.set_xlabel("seconds from start of process")
    _marks(warm, document, warm_s)
    warm.set_title("The same, caches kept")
    warm.set_xlabel("seconds from start of process")
    _finish(figure, document, libraries)


def _marks(
    axes: Any, document: dict[str, Any], figure_of: Callable[[Row | None], float | None]
) -> list[str]:
    """A line for each case with a mark for each library; returns the libraries drawn."""
    rows = cases(document)
    drawn: list[str] = []
    for place, libraries in enumerate(rows.values()):
        values = {name: figure_of(row) for name, row in libraries.items()}
        known = {name: value for name, value in values.items() if value is not None}
        if known:
            axes.plot(
                [min(known.values()), max(known.values())], [place] * 2, color=LIGHT, zorder=1
            )
        for name, value in known.items():
            colour, marker = STYLES.get(name, (GREY, "x"))
            own = name == "fastsvi"
            axes.plot(
                value, place, marker, color=colour, markersize=8 if own else 6.5,
                zorder=3 if own else 2, markeredgecolor="white", markeredgewidth=0.7,
            )  # fmt: skip
            drawn += [] if name in drawn else [name]
    axes.set_xscale("log")
    _label(axes.xaxis)
    axes.set_yticks(range(len(rows)), [title(case) for case in rows])
    axes.tick_params(axis="y", length=0, labelcolor="black")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=LIGHT, linewidth=0.5)
    axes.set_axisbelow(True)
    return [name for name in STYLES if name in drawn]


def _finish(figure: Any, document: dict[str, Any], libraries: Sequence[str]) -> None:
    """Size, the legend above, and where the figures are from below."""
    from matplotlib.lines import Line2D

    count = len(cases(document))
    figure.set_size_inches(WIDTH, 1.7 + 0.32 * count)
    handles = [
        Line2D([], [], color=STYLES[name][0], marker=STYLES[name][1], linestyle="",
               markersize=7, label=LABELS.get(name, name))
        for name in libraries
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles),
        handletextpad=0.1, columnspacing=1.2,
    )  # fmt: skip
    _sign(figure, document)


def _sign(figure: Any, document: dict[str, Any]) -> None:
    """One line about the machine, small, below the picture."""
    about = document.get("machine", document)
    where = about.get("gpu") or about.get("cpu") or about.get("device")
    threads = document.get("settings", {}).get("threads")
    on = f", {threads} thread{'s' if threads > 1 else ''}" if threads else ""
    versions = about.get("versions", {})
    shown = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "numpyro") if name in versions
    )
    figure.supxlabel(
        f"{where}{on}; {shown}; commit {about.get('commit')}", fontsize=7.5, color=GREY, ha="right",
        x=0.995,
    )  # fmt: skip


def _label(axis: Any) -> None:
    """Plain numbers at the ticks; within two decades, between the powers of ten as well."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_formatter(FuncFormatter(_plain))
    if axis.get_scale() != "log":
        return
    low, high = axis.get_view_interval()
    is_narrow = high < 100 * low
    axis.set_major_locator(LogLocator(numticks=12))
    axis.set_minor_locator(LogLocator(subs=(2.0, 3.0, 5.0) if is_narrow else "auto", numticks=12))
    axis.set_minor_formatter(FuncFormatter(_plain) if is_narrow else NullFormatter())


def _plain(value: float, position: Any = None) -> str:
    """A tick of a logarithmic axis without powers, as far as that is readable."""
    if value >= 1e9:
        return f"{value / 1e9:g}G"
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


# ----------------------------------------------------------------------------------- scaling


def _scaling(figure: Any, document: dict[str, Any]) -> None:
    curves: dict[str, list[dict[str, Any]]] = {}
    for curve in document["curves"]:
        if any("step_us" in point for point in curve["points"]):
            curves.setdefault(curve["curve"], []).append(curve)
    columns = 2 if len(curves) > 1 else 1
    lines = -(-len(curves) // columns)
    figure.set_size_inches(WIDTH, 0.5 + 3.0 * max(1, lines))
    grid = figure.subplots(max(1, lines), columns, squeeze=False).ravel()
    for axes, (name, several) in zip(grid, curves.items(), strict=False):
        _curve(axes, name, several)
    for axes in grid[len(curves) :]:
        axes.set_visible(False)
    figure.suptitle(
        "Microseconds per step as the problem grows",
        x=0.01,
        ha="left",
        fontsize=12,
        fontweight="bold",
    )
    _sign(figure, document)


def _curve(axes: Any, name: str, several: Sequence[dict[str, Any]]) -> None:
    for curve in several:
        points = [point for point in curve["points"] if "step_us" in point]
        sizes = [point["size"] for point in points]
        times = [point["step_us"] for point in points]
        colour, marker = STYLES.get(curve["library"], (GREY, "x"))
        label = LABELS.get(curve["library"], curve["library"])
        if curve["exponent"] is not None and name != "threads":
            label += f": size to the power {curve['exponent']:.2f}"
        low = [point["step_us"] - point["lowest_us"] for point in points]
        high = [point["highest_us"] - point["step_us"] for point in points]
        axes.errorbar(
            sizes, times, yerr=[low, high], color=colour, marker=marker, markersize=5,
            linewidth=1.5, elinewidth=0.8, label=label,
        )  # fmt: skip
    floor = max((curve["points"] for curve in several), key=len)
    floor = [point for point in floor if "floor_us" in point]
    if name in ("elements", "fits") and floor:  # more particles move no more of them
        axes.plot(
            [point["size"] for point in floor], [point["floor_us"] for point in floor],
            "--", color=GREY, linewidth=1, label="floor: a copy of the bytes",
        )  # fmt: skip
    if name == "threads":
        axes.set_xticks(sorted({p["size"] for c in several for p in c["points"]}))
        axes.set_ylim(bottom=0)
        axes.margins(x=0.2)
    else:
        axes.set_xscale("log")
        axes.set_yscale("log")
        _label(axes.xaxis)
    _label(axes.yaxis)
    axes.set_xlabel(AXES.get(name, name))
    axes.grid(color=LIGHT, linewidth=0.5)
    axes.legend(loc="upper left")


# ----------------------------------------------------------------------------------- kernels


def _kernels(figure: Any, document: dict[str, Any]) -> None:
    """Bandwidth that the kernels reach over the bytes they move, below the roof of a copy."""
    axes = figure.subplots()
    figure.set_size_inches(WIDTH, 5.0)
    operations: dict[str, list[Row]] = {}
    for row in document["rows"]:
        operations.setdefault(row["name"], []).append(row)
    colours: dict[str, str] = {}
    for name, rows in operations.items():
        # Forward and backward of one operation share a colour.
        base = name.removesuffix(".backward")
        colour = colours.setdefault(base, OPERATIONS[len(colours) % len(OPERATIONS)])
        # Of several shapes with as many bytes, the fastest: what the kernel can do.
        best: dict[int, float] = {}
        for row in rows:
            reached = row["bytes"] / row["time_us"] / 1e3
            best[row["bytes"]] = max(best.get(row["bytes"], 0.0), reached)
        moved = sorted(best)
        dashes = "--" if name.endswith(".backward") else "-"
        axes.plot(
            moved, [best[x] for x in moved], dashes, color=colour, marker="o", markersize=3.5,
            linewidth=1.4, label=name,
        )  # fmt: skip
    axes.axhline(document["copy_gb_per_s"], color="black", linewidth=1)
    axes.text(
        1.0, document["copy_gb_per_s"] * 1.06, "a copy", ha="right", va="bottom",
        transform=axes.get_yaxis_transform(),
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(top=document["copy_gb_per_s"] * 3)
    _label(axes.xaxis)
    _label(axes.yaxis)
    axes.set_xlabel("bytes that must be moved")
    axes.set_ylabel("GB per second")
    axes.set_title("Kernels below the roof that memory sets")
    axes.grid(color=LIGHT, linewidth=0.5)
    axes.legend(loc="lower right", fontsize=8, frameon=True, framealpha=1, edgecolor="none")
    _sign(figure, document)
