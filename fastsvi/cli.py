"""The ``fastsvi`` command: ``fastsvi profile model.py``, ``fastsvi examples``, ``fastsvi cache``.

    fastsvi profile train.py --its-own 3   # where a step of its first fit goes, and what would help
    fastsvi profile model.py:make          # of what the function make() returns
    fastsvi examples                       # runnable examples
    fastsvi cache --clear                  # the compiled steps on disk

A script is run as ``python train.py`` would run it, up to the first call of ``svi.step`` or
``svi.run``; this fit is measured in place of being trained, and the script ends there.
"""

from __future__ import annotations

import argparse
import inspect
import json
import runpy
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastsvi
from fastsvi.engine.loops import build
from fastsvi.errors import FastSVIError
from fastsvi.examples import EXAMPLES
from fastsvi.infer import SVI
from fastsvi.infer.profiling import Profile, profile
from fastsvi.infer.profiling.advice import advise
from fastsvi.infer.profiling.figures import figure, size

# Of argparse for wrong usage; 1 is for what went wrong in the script or the fit.
_USAGE = 2


class _Profiled(BaseException):
    """Ends a script whose fit has been profiled. No ``except Exception`` of its own stops it."""

    def __init__(self, found: Profile) -> None:
        super().__init__("profiled")
        self.found = found


class _UsageError(Exception):
    """The command was called wrongly; the message says how."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 if it failed, 2 if it was called wrongly."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except _UsageError as error:
        print(f"fastsvi: {error}", file=sys.stderr)
        return _USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastsvi", description="Stochastic variational inference at hardware speed."
    )
    parser.add_argument("--version", action="version", version=f"fastsvi {fastsvi.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    found = commands.add_parser(
        "profile",
        help="where the time of a step goes, and what would speed it up",
        description="Run a script up to its first svi.step or svi.run, and measure that fit.",
        epilog="Options come before the script; what follows it are the script's own arguments.",
    )
    found.add_argument("--json", type=Path, metavar="FILE", help="keep the figures in a file, too")
    found.add_argument(
        "--seconds", type=_positive, default=1.0, help="to measure each form of the step (1)"
    )
    found.add_argument(
        "program",
        metavar="model.py[:function]",
        help="a script; or a file with a function to call, which fits, or returns "
        "(svi, args) or (svi, args, kwargs) to be measured",
    )
    found.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    found.set_defaults(command=_profile)

    found = commands.add_parser("examples", help="list the runnable examples")
    found.set_defaults(command=_examples)

    found = commands.add_parser("cache", help="where compiled steps are kept, and how many")
    found.add_argument("--clear", action="store_true", help="remove them")
    found.set_defaults(command=_cache)
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, found {text}")
    return value


# ------------------------------------------------------------------------------------------ profile


def _profile(options: argparse.Namespace) -> int:
    path, function = _split(options.program)
    began = time.perf_counter()
    try:
        with _as_script(path, options.arguments), _measuring(options.seconds):
            found = _run(path, function, options.seconds)
    except _Profiled as ended:
        found = ended.found
    except FastSVIError as error:
        traceback.print_exc()
        print(f"fastsvi profile: {path} failed: {type(error).__name__}", file=sys.stderr)
        return 1
    if found is None:
        print(
            f"fastsvi profile: {path} ended after {figure(time.perf_counter() - began)} s without "
            "a call of svi.step or svi.run, so there is nothing to measure. Is the fit inside of a "
            "function that nobody calls? Name it: model.py:function.",
            file=sys.stderr,
        )
        return 1
    print(found)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
        print(f"\nwrote {options.json}")
    return 0


def _split(program: str) -> tuple[Path, str | None]:
    """File and function of ``model.py:function``."""
    name, function = program, None
    if not Path(program).exists() and ":" in program:
        name, _, function = program.rpartition(":")
    path = Path(name)
    if not path.is_file():
        raise _UsageError(f"there is no file {name!r}; give a script, or model.py:function")
    return path, function


def _run(path: Path, function: str | None, seconds: float) -> Profile | None:
    """Run a script, or a function of a file; a profile if the function returns a fit."""
    if function is None:
        runpy.run_path(str(path), run_name="__main__")
        return None
    names = runpy.run_path(str(path), run_name=path.stem)
    make = names.get(function)
    if not callable(make):
        own = (f for f in names.values() if inspect.isfunction(f) and f.__module__ == path.stem)
        known = sorted(f.__name__ for f in own)
        raise _UsageError(f"{path} has no function {function!r}; it has {known}")
    made = make()
    if made is None:
        return None
    parts = made if isinstance(made, tuple) else (made,)
    svi, args, kwargs = (*parts, *((), {})[len(parts) - 1 :])[:3]
    if not (isinstance(svi, SVI) and isinstance(args, tuple) and isinstance(kwargs, dict)):
        raise _UsageError(
            f"{function}() must return (svi, args) or (svi, args, kwargs), an SVI with a tuple and "
            f"a dict, found {[type(part).__name__ for part in parts]}"
        )
    return profile(svi, *args, seconds=seconds, **kwargs)


@contextmanager
def _as_script(path: Path, arguments: Sequence[str]) -> Iterator[None]:
    """``sys.argv`` and the import path of ``python path arguments``."""
    argv, places = sys.argv, list(sys.path)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, places


@contextmanager
def _measuring(seconds: float) -> Iterator[None]:
    """Have the first call of ``SVI.step`` or ``SVI.run`` measure, and end the script."""
    step, run = SVI.step, SVI.run

    def end(called: str, svi: SVI, args: Any, kwargs: Any, **more: Any) -> None:
        SVI.step, SVI.run = step, run  # type: ignore[method-assign]
        found = profile(svi, *args, seconds=seconds, **more, **kwargs)
        found.called = called
        found.advice = advise(found)
        raise _Profiled(found)

    def step_once(self: SVI, *args: Any, **kwargs: Any) -> None:
        end("step", self, args, kwargs)

    def run_once(self: SVI, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(run).bind(self, *args, **kwargs).arguments
        more = {name: bound[name] for name in ("batches", "fit_dims") if name in bound}
        end("run", self, bound.get("args", ()), bound.get("kwargs", {}), **more)

    SVI.step, SVI.run = step_once, run_once  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        SVI.step, SVI.run = step, run  # type: ignore[method-assign]


# ----------------------------------------------------------------------------------- other commands


def _examples(options: argparse.Namespace) -> int:
    for name, what in EXAMPLES.items():
        print(f"python -m fastsvi.examples.{name:<15} {what}")
    return 0


def _cache(options: argparse.Namespace) -> int:
    folder = build.cache_folder()
    kept = sorted(folder.glob("*.so")) if folder.is_dir() else []
    total = sum(_size_of(path) for path in kept)
    print(f"{folder}: {len(kept)} compiled steps, {size(total)}")
    if not options.clear:
        return 0
    failed = [path for path in kept if not _remove(path)]
    print(f"removed {len(kept) - len(failed)}")
    if failed:
        print(f"fastsvi cache: could not remove {failed[0]} and the like", file=sys.stderr)
    return int(bool(failed))


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process has removed it meanwhile
        return 0


def _remove(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
