"""Figures and the README's table of performance, from the results in ``bench/results``.

    python -m bench.report                       # all results there are: pictures and the table
    python -m bench.report a.json b.json         # of these files only
    python -m bench.report --check               # is the README what the results say?

The kind of a file is told by what is in it: rows of :mod:`bench.compare`, curves of
:mod:`bench.scaling`, rows of :mod:`bench.kernels`; anything else is passed over. Pictures go to
``bench/results``. The table stands in the README between two lines, ``<!-- bench:begin -->`` and
``<!-- bench:end -->``; every row of the results is in it, lost ones too, and a blank has a reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.machine import short_name
from bench.table import memory, microseconds, seconds, steps

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

TITLES = {
    "eight_schools": "eight schools",
    "logistic": "logistic regression",
    "intercepts": "varying intercepts",
    "wide": "normal means",
    "minibatch": "logistic, minibatches",
    "vae": "VAE",
    "regressions": "regressions",
}
LABELS = {
    "fastsvi": "fastsvi",
    "fastsvi-eager": "fastsvi, eager",
    "numpyro": "NumPyro",
    "torch-compiled": "torch.compile, by hand",
    "torch": "torch, by hand",
    "pyro": "Pyro",
    "pyro-jit": "Pyro, JIT",
}
PEERS = ("numpyro", "pyro", "torch-compiled", "torch", "pyro-jit", "fastsvi-eager")

Row = dict[str, Any]


class ReportError(Exception):
    """A file or the README is not as it should be; the message says what to change."""


@dataclass
class Results:
    """Documents by kind, each with the name of its file."""

    compare: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    scaling: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    kernels: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


def read(paths: Sequence[Path]) -> Results:
    """Sort files by what is in them.

    Raises:
        ReportError: a file is not JSON.
    """
    found = Results()
    for path in paths:
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ReportError(f"{path} cannot be read: {error}") from error
        rows = document.get("rows") or [{}]
        if "curves" in document:
            found.scaling.append((path.name, document))
        elif "share_of_copy" in rows[0]:
            found.kernels.append((path.name, document))
        elif "repeats" in rows[0]:
            found.compare.append((path.name, document))
    return found


# ------------------------------------------------------------------------------- figures of a row


def counted(row: Row | None) -> list[dict[str, Any]]:
    """The repeats of a row that passed its gate."""
    return [] if row is None else [r for r in row["repeats"] if r.get("gate") == "passed"]


def step_us(row: Row | None) -> float | None:
    """Median microseconds per step; None where none count."""
    return _median(steps(counted(row)))


def cold_s(row: Row | None) -> float | None:
    return _median([r["fit_cold_s"] for r in counted(row) if "fit_cold_s" in r])


def warm_s(row: Row | None) -> float | None:
    """Seconds of a fit with warm caches; the cold time where a library keeps none."""
    return _median([r["fit_warm_s"] for r in counted(row) if "fit_warm_s" in r]) or cold_s(row)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def cases(document: dict[str, Any]) -> dict[tuple[str, int, int], dict[str, Row]]:
    """Rows by workload, particles and fits, and then by library, in the order of the file."""
    found: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in document["rows"]:
        key = row["workload"], row["particles"], row["fits"]
        found.setdefault(key, {})[row["library"]] = row
    return found


def has_fits(document: dict[str, Any]) -> bool:
    """Whether whole fits were timed, and not only steps."""
    return any(cold_s(row) is not None for row in document["rows"])


def title(case: tuple[str, int, int]) -> str:
    """How a case is called.

    >>> title(("eight_schools", 64, 1)), title(("regressions", 1, 1000))
    ('eight schools, P = 64', '1,000 regressions, P = 1')
    """
    workload, particles, fits = case
    name = TITLES.get(workload, workload)
    head = f"{fits:,} {name}" if fits > 1 else name
    return f"{head}, P = {particles:,}"


# ------------------------------------------------------------------------------------- the table


def table(results: Results, pictures: Sequence[str] = ()) -> str:
    """The README's section between the markers, in Markdown."""
    parts = [_table(document) for _, document in results.compare]
    parts += [_kernel_table(document) for _, document in results.kernels]
    parts += [f"![{_alternative(name)}](bench/results/{name})" for name in pictures]
    return "\n\n".join(parts)


def _table(document: dict[str, Any]) -> str:
    notes: list[str] = []
    libraries = _present(document)
    head = ["workload", *(f"{LABELS.get(name, name)}" for name in libraries)]
    head += ["fastsvi / NumPyro"] if "numpyro" in libraries else []
    with_fits = has_fits(document)
    head += ["cold fit, s", "warm fit, s", "MB"] if with_fits else []
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    for case, rows in cases(document).items():
        own, peer = rows.get("fastsvi"), rows.get("numpyro")
        cells = [title(case), *(_step_cell(rows.get(name), name, notes) for name in libraries)]
        if "numpyro" in libraries:
            cells.append(_ratio(step_us(own), step_us(peer)))
        if with_fits:
            cells += [_pair(own, peer, cold_s, seconds), _pair(own, peer, warm_s, seconds)]
            cells.append(_pair(own, peer, _peak, "{:.0f}".format))
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines)
    return "\n\n".join([text, _about(document), *([_footnotes(notes)] if notes else [])])


def _present(document: dict[str, Any]) -> list[str]:
    """The libraries of a document, fastsvi first."""
    there = {row["library"] for row in document["rows"]}
    return [name for name in ("fastsvi", *PEERS) if name in there]


def _step_cell(row: Row | None, library: str, notes: list[str]) -> str:
    """Median microseconds per step, with a mark for the note of the row."""
    if row is None:
        return "-" + _mark("not measured", notes)
    value = step_us(row)
    text = "-" if value is None else microseconds(value)
    note = row["note"] or (None if value is not None else "no steady steps were measured")
    return text + (_mark(note, notes) if note else "")


def _mark(note: str, notes: list[str]) -> str:
    """A footnote's mark; equal notes share one."""
    if note not in notes:
        notes.append(note)
    return f" <sup>{notes.index(note) + 1}</sup>"


def _footnotes(notes: list[str]) -> str:
    return "<br>\n".join(f"<sup>{k}</sup> {_one_line(note)}" for k, note in enumerate(notes, 1))


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").replace("<", "&lt;").split())[:240]


def _ratio(own: float | None, peer: float | None) -> str:
    """The ratio, in bold where fastsvi loses, so that no loss is overlooked."""
    if own is None or peer is None:
        return "-"
    ratio = own / peer
    return f"**{ratio:.2f}**" if ratio > 1 else f"{ratio:.2f}"


def _pair(
    own: Row | None,
    peer: Row | None,
    figure: Callable[[Row | None], float | None],
    text: Callable[[float], str],
) -> str:
    """A figure of fastsvi and of NumPyro; ``~`` before times of fits that were stopped early."""
    cells = []
    for row in (own, peer):
        value = figure(row)
        short = figure is not _peak and any(r.get("extrapolated") for r in counted(row))
        cells.append("-" if value is None else "~" * short + text(value))
    return ", ".join(cells)


def _peak(row: Row | None) -> float | None:
    return None if row is None else _median(memory(row, counted(row)))


def _about(document: dict[str, Any]) -> str:
    """What must be known to read the table: columns, machine, versions, commit, threads."""
    machine, settings = document["machine"], document["settings"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    where = f"{machine['cores']} cores of {machine['cpu']}"
    if "gpu" in machine:
        where = f"{machine['gpu']}, driver {machine['driver']}, {where}"
    threads = settings.get("threads")
    if threads:
        where += f", {threads} thread{'s' if threads > 1 else ''}"
    repeats = settings.get("repeats")
    if repeats:
        where += f", {repeats} repeat{'s' if repeats > 1 else ''}"
    quick = " (a quick run)" if settings.get("quick") else ""
    if "started" in settings:
        quick += f", {settings['started'][:10]}"
    runs = _runs(settings.get("merged", []))
    fits = (
        "*Fits* in seconds from the start of the process to the end, fastsvi's and then NumPyro's, "
        "with all caches of compiled code empty (cold) or kept (warm; the cold time where a "
        "library keeps none; ~ extrapolated); *MB* is the peak beyond the imports, likewise. "
    )
    return (
        "Microseconds per step of a long run, median; P is the number of particles. "
        f"{fits if has_fits(document) else ''}A ratio in bold is lost. A time counts only if the "
        f"fit is right: its guide's ELBO, or its losses, are those of the others. {where}, load "
        f"{machine['load']} at the start{quick}; python "
        f"{machine['python']}, {versions}; commit {machine['commit']}.{runs}"
    )


def _runs(merged: list[dict[str, Any]]) -> str:
    """Which rows were measured when, where a document holds those of several runs."""
    runs = [
        f"{', '.join(LABELS[name] for name in run['libraries'])}: {run['repeats']} "
        f"repeat{'s' if run['repeats'] > 1 else ''}, {run['started'][:16].replace('T', ' ')} UTC, "
        f"commit {run['commit']}"
        for run in merged
    ]
    return f" Of {len(runs)} runs. {'; '.join(runs)}." if runs else ""


def _kernel_table(document: dict[str, Any]) -> str:
    """One line per operation, at its largest size."""
    lines = [
        "| kernel | D | P | us | of copy | of Philox | eager torch | torch.compile |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    largest: dict[str, Row] = {}
    for row in document["rows"]:
        known = largest.get(row["name"])
        if known is None or _numbers(row) >= _numbers(known):
            largest[row["name"]] = row
    for name, row in largest.items():
        cells = [
            f"`{name}`",
            f"{row['elements']:,}",
            f"{row['particles']:,}",
            microseconds(row["time_us"]),
            f"{row['share_of_copy']:.0%}",
            "no noise" if row["share_of_philox"] is None else f"{row['share_of_philox']:.0%}",
            f"{row['eager_ratio']:.1f}x",
            "not timed" if row["compiled_ratio"] is None else f"{row['compiled_ratio']:.1f}x",
        ]
        cells[3] += "" if row["ok"] else " (wrong)"
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {found}" for name, found in document["versions"].items())
    driver = f", driver {document['driver']}" if "driver" in document else ""
    about = (
        "Kernels at their largest size: share of the bandwidth of a copy in the same run "
        f"({document['copy_gb_per_s']:,.0f} GB/s), for noise also of what Philox's multiplications "
        "take; then the time of eager torch and of torch.compile over ours. "
        f"{document['device']}{driver}; {versions}; commit {document['commit']}."
    )
    return "\n".join(lines) + "\n\n" + about


def _numbers(row: Row) -> int:
    return int(row["elements"] * row["particles"])


def _alternative(name: str) -> str:
    """What stands for a picture where it is not shown."""
    kinds = {
        "-steps.png": "Time per step beside the peers, by workload.",
        "-fits.png": "Time to fit beside the peers, by workload.",
        "-scaling.png": "Time per step over the number of elements, particles and fits.",
        "-kernels.png": "Kernels against the bandwidth of a copy.",
    }
    return next((text for end, text in kinds.items() if name.endswith(end)), name)


# ------------------------------------------------------------------------------------- the README


def put(readme: str, section: str) -> str:
    """``readme`` with ``section`` between the markers.

    Raises:
        ReportError: the markers are not there, each once and in order.
    """
    if (
        readme.count(BEGIN) != 1
        or readme.count(END) != 1
        or readme.index(BEGIN) > readme.index(END)
    ):
        raise ReportError(f"the README needs one line {BEGIN} and below it one line {END}")
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def stem(file: str, document: dict[str, Any]) -> str:
    """First part of the names of a document's pictures: ``cpu``, or the GPU's name; and threads."""
    about = document.get("machine", document)
    gpu = about.get("gpu") or (about.get("device") if "driver" in about else None)
    threads = document.get("settings", {}).get("threads") or 1
    return (short_name(gpu) if gpu else "cpu") + (f"-{threads}-threads" if threads > 1 else "")


def main(arguments: list[str] | None = None) -> int:
    """Write pictures and table; with ``--check`` only say whether the README is up to date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "files", nargs="*", type=Path, help="results; default: bench/results/*.json"
    )
    parser.add_argument("--readme", type=Path, default=README, help="file with the markers")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the pictures")
    parser.add_argument("--no-pictures", action="store_true", help="write the table only")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if the README is out of date"
    )
    options = parser.parse_args(arguments)
    try:
        results = read(options.files or sorted(RESULTS.glob("*.json")))
        from bench.pictures import names, paint

        section = table(results, names(results))
        readme = options.readme.read_text()
        made = put(readme, section)
    except ReportError as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 1
    if options.check:
        if made != readme:
            print(
                f"bench.report: {options.readme} differs from what the results say; run "
                "python -m bench.report",
                file=sys.stderr,
            )
        return int(made != readme)
    if not options.no_pictures:
        options.out.mkdir(parents=True, exist_ok=True)
        for path in paint(results, options.out):
            print(f"wrote {path}")
    if made != readme:
        options.readme.write_text(made)
        print(f"wrote {options.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
