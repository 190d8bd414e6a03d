"""A profile as plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastsvi.infer.profiling.figures import figure, size

if TYPE_CHECKING:
    from fastsvi.infer.profiling.profile import Profile

_WIDTH = 100
_BAR = 30
# In the order in which they happen; what else a clock has noted follows.
_PHASES = {
    "guide": "guide: draws, log q",
    "model": "model, log p where the guide is automatic",
    "ELBO": "ELBO: log-densities, particles",
    "loss and gradient": "loss and gradient, by a function of its own",
    "gradient": "gradient: backward",
    "update": "update: optimizer",
}


def as_text(found: Profile) -> str:
    """Tables of times and memory, then the advice."""
    parts = [_head(found), *_eager(found), "", *_native(found), "", *_memory(found)]
    parts += ["", "advice", *_advice(found)]
    return "\n".join(parts)


def _head(found: Profile) -> str:
    fits = f", one fit of {found.num_fits}" if found.num_fits > 1 else ""
    how = "" if found.particles == 1 else ", one by one" if found.is_sequential else ", at once"
    number = f"{found.particles} particle{'s' if found.particles > 1 else ''}{how}"
    threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}"
    return f"a step with {number}{fits}; {found.dtype} on {found.device}, {threads}\n"


def _eager(found: Profile) -> Iterator[str]:
    eager = found.eager
    yield _line("eager step (svi.step)", eager.step_us, f"us, least {figure(eager.lowest_us)}")
    total = sum(eager.phases.values()) or 1.0
    names = [name for name in _PHASES if name in eager.phases]
    names += [name for name in eager.phases if name not in _PHASES]
    for name in names:
        share = eager.phases[name] / total
        bar = "#" * round(_BAR * share)
        yield _line(f"  {_PHASES.get(name, name)}", eager.phases[name], f"{share:>6.0%} {bar}")
    inside = min(1.0, eager.torch_us / eager.step_us)
    yield _line("  of this inside torch operations", eager.torch_us, f"{inside:>6.0%} at most")
    yield _line("  operations called", eager.operations, "")
    if found.batch_us is not None:
        yield _line("until a batch is there", found.batch_us, "us")


def _native(found: Profile) -> Iterator[str]:
    native = found.native
    if native is None:
        yield from _wrapped(f"captured step: none, because {found.obstacle}", "", "  ")
        return
    gain = found.eager.step_us / native.step_us
    least = f"us, least {figure(native.lowest_us)}; {figure(gain)} times as fast"
    yield _line("captured step (svi.run)", native.step_us, least)
    yield _line("  recorded in", native.record_s, "s")
    how = "s, from the cache on disk" if native.cached else "s, not in the cache before"
    yield _line("  compiled in", native.compile_s, how)
    if native.nests:
        yield _line("  operations recorded", native.operations, "")
        yield _line("  loop nests", native.nests, f"of which {native.calls} library calls")
        yield _memory_line("  memory touched", native.bytes, ", each array once in each nest")
        yield _line("  a copy of as much takes", native.copy_us, "us")
        yield _line("  random numbers drawn", native.noise, "")


def _memory(found: Profile) -> Iterator[str]:
    yield _memory_line("parameters", found.params_bytes)
    if found.native is not None:
        yield _memory_line("moments of the optimizer", found.native.moments_bytes)
        yield _memory_line("working memory, captured", found.native.arena_bytes)
    yield _memory_line("data in the arguments", found.data_bytes)
    yield _memory_line("peak of the process", found.peak_bytes)


def _advice(found: Profile) -> Iterator[str]:
    if not found.advice:
        yield "  none: nothing was found that would make these steps faster"
    for number, advice in enumerate(found.advice, 1):
        yield from _wrapped(advice.text, f"  {number}. ", "     ")


def _line(what: str, value: float, unit: str) -> str:
    return f"{what:<46}{figure(value):>12} {unit}".rstrip()


def _memory_line(what: str, num_bytes: float, after: str = "") -> str:
    number, unit = size(num_bytes).split()
    return f"{what:<46}{number:>12} {unit}{after}"


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=rest,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
