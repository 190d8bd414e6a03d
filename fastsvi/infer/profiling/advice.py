"""What would speed a step up, each piece of advice with the finding that it follows from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastsvi.infer.profiling.figures import figure
from fastsvi.infer.profiling.figures import size as in_units

if TYPE_CHECKING:
    from fastsvi.infer.profiling.profile import Profile

# A change must promise to save this share of a step to be worth a word.
_WORTH = 0.1
# Within this factor of a copy of the same bytes, a step is bound by memory.
_NEAR_COPY = 2.0
# Parameters and data that no cache holds.
_LARGE = 1 << 22

# For obstacles that do not name their remedy themselves.
_REMEDIES = {
    "not an ELBO": "Give SVI an ELBO such as Trace_ELBO(): a function as loss is not recorded.",
    "draws from torch's generator": "Draw by a sample statement, whose noise can be replayed.",
    "every step is to be checked": "Switch checks of every step off once the program is right.",
    "do not lie in one buffer": "Keep all parameters in one dtype and on one device.",
}


@dataclass(frozen=True)
class Advice:
    """``about`` is a key for programs, ``text`` says what was found and what to change."""

    about: str
    text: str


def advise(found: Profile) -> list[Advice]:
    """Advice that follows from a profile, the most profitable first as far as that is known."""
    steps = (_eager_only, _use_run, _validation, _particles, _arrays, _conversions, _batches, _wide)
    return [advice for step in steps for advice in step(found)]


def _eager_only(found: Profile) -> Iterator[Advice]:
    if found.obstacle is None:
        return
    remedy = next((r for key, r in _REMEDIES.items() if key in found.obstacle), "")
    text = f"svi.run stays eager, because {found.obstacle.rstrip('.')}. {remedy}"
    yield Advice("eager-only", text.strip())


def _use_run(found: Profile) -> Iterator[Advice]:
    if found.native is None or found.called == "run":
        return
    gain = found.eager.step_us / found.native.step_us
    if gain < 1 + _WORTH:
        return
    yield Advice(
        "use-run",
        f"{found.eager.python_share:.0%} of an eager step is Python and what calls operations, "
        f"{found.eager.operations} of them. svi.run(num_steps, ...) takes "
        f"{figure(found.native.step_us)} us a step in place of the "
        f"{figure(found.eager.step_us)} us of svi.step: {figure(gain)} times as fast, once it has "
        f"spent {found.native.record_s + found.native.compile_s:.2g} s on capturing the step.",
    )


def _validation(found: Profile) -> Iterator[Advice]:
    unchecked = found.unchecked_us
    if unchecked is None:
        return
    share = max(0.0, 1 - unchecked / found.eager.step_us)
    yield Advice(
        "validation",
        f"Every step is checked in full, which takes {share:.0%} of an eager step and keeps "
        'svi.run from compiling. The default, settings.set(validate="first"), checks the first '
        "step, and later ones through their loss.",
    )


def _particles(found: Profile) -> Iterator[Advice]:
    if found.particles < 2 or not found.is_sequential:
        return
    head = f"The {found.particles} particles run one by one."
    if found.vmap_obstacle is not None:
        yield Advice("particles", f"{head} {found.vmap_obstacle}")
        return
    at_once = found.vectorized_us
    if at_once is not None and at_once < (1 - _WORTH) * found.eager.step_us:
        yield Advice(
            "particles",
            f"{head} Trace_ELBO(num_particles={found.particles}, vectorize_particles=True) runs "
            f"them at once: {figure(at_once)} us an eager step, measured, in place of "
            f"{figure(found.eager.step_us)}.",
        )


def _arrays(found: Profile) -> Iterator[Advice]:
    for name, what in found.foreign_arguments:
        yield Advice(
            "conversion",
            f"{name} is {what}: whatever the model makes of it is made anew at every eager step. "
            "Pass a tensor, torch.as_tensor(...), made once.",
        )


def _conversions(found: Profile) -> Iterator[Advice]:
    for where, size in found.eager.conversions.items():
        yield Advice(
            "conversion",
            f"{where} converts or copies {in_units(size)} at every eager step. Do it once, "
            "before the fit, and pass the result.",
        )


def _batches(found: Profile) -> Iterator[Advice]:
    wait = found.batch_us
    step = found.step_us
    if wait is not None and wait > _WORTH * (wait + step):
        yield Advice(
            "batches",
            f"A batch takes {figure(wait)} us to come, beside {figure(step)} us for its step. Load "
            "in other processes (num_workers of a DataLoader), use larger batches, or hold the "
            'data in memory and let plate("data", n, subsample_size=b) choose the rows.',
        )


def _wide(found: Profile) -> Iterator[Advice]:
    is_large = found.params_bytes + found.data_bytes > _LARGE
    if found.dtype == "float64" and is_large:
        yield Advice(
            "float64",
            f"Parameters are float64, and a step reads {in_units(found.data_bytes)} of data and "
            f"{in_units(found.params_bytes)} of parameters, more than a cache holds. float32 "
            "halves the bytes; densities are summed safely in it. Keep float64 if single terms "
            "need more than seven digits.",
        )
    native = found.native
    if native is not None and is_large and native.step_us < _NEAR_COPY * native.copy_us:
        yield Advice(
            "memory-bound",
            f"A captured step moves {in_units(native.bytes)}, which a copy takes "
            f"{figure(native.copy_us)} us to move, in {figure(native.step_us)} us: memory bounds "
            "it. Fewer bytes are all that helps: fewer particles, float32, or a random subset of "
            "the rows by plate(..., subsample_size=b).",
        )
