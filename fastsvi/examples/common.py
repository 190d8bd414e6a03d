"""What the examples share: their arguments, their tables, and help when a package is missing."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor


def arguments(
    doc: str | None, *, particles: int, steps: int | None = None
) -> argparse.ArgumentParser:
    """The arguments that examples share, described by the docstring of the module."""
    parser = argparse.ArgumentParser(
        description=(doc or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps, help=f"SVI steps ({steps})")
    what = "draws" if steps is None else "draws of the guide per step"
    parser.add_argument("--particles", type=int, default=particles, help=f"{what} ({particles})")
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness (0)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (cuda if there is one)",
    )
    return parser


def require(module: str, package: str) -> ModuleType:
    """Import an optional package, or end with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SystemExit(
            f'this example needs {package}: pip install -e ".[examples]" (or pip install {package})'
        ) from None


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread for a ``with`` block.

    Operations this small gain nothing from a second thread, and where another program wants the
    core they wait for it at every step: ten times slower, at worst.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def print_posterior(
    names: Iterable[str],
    draws: Tensor,  # [S, N], constrained
    *,
    title: str,
    extra: dict[str, Iterable[str]] | None = None,
) -> None:
    """One row per column of ``draws``: mean, standard deviation, and the central 90%."""
    names = list(names)
    columns = {head: list(column) for head, column in (extra or {}).items()}
    width = max(len(title), *map(len, names))
    heads = "".join(f"  {head:>9}" for head in columns)
    print(f"{title:<{width}}  {'mean':>7}  {'sd':>6}  {'5%':>7}  {'95%':>7}{heads}")
    low, high = interval(draws)
    for i, name in enumerate(names):
        cells = "".join(f"  {column[i]:>9}" for column in columns.values())
        mean, sd = float(draws[:, i].mean()), float(draws[:, i].std())
        row = f"{name:<{width}}  {mean:7.2f}  {sd:6.2f}  {low[i]:7.2f}  {high[i]:7.2f}{cells}"
        print(row.rstrip())


def interval(draws: Tensor, mass: float = 0.9) -> tuple[Tensor, Tensor]:
    """Lower and upper end of the central ``mass`` of ``draws [S, ...]``."""
    ends = torch.tensor([(1 - mass) / 2, (1 + mass) / 2], dtype=draws.dtype, device=draws.device)
    low, high = torch.quantile(draws, ends, dim=0)
    return low, high
