"""Memory: how much a run takes, how much there is, and how torch says that it ran out.

On a CPU the peak of :meth:`SVI.run` for a wide model stays within a tenth of :func:`floor_bytes`,
beyond the data and the libraries. The first compiled step of a process adds 3 MB, however wide the
model: parts of torch's libraries that nothing has called before. The floor counts

- five numbers for each of the ``N`` parameters: the value, its gradient, two moments of Adam, and
  the copy that the run returns; where the particles are evaluated in chunks also the gradient of
  one chunk;
- one number for each of the ``D`` latent elements of the particles that are evaluated at once,
  ``chunk_size`` or all: the noise of the draw, from which the compiled step makes all else.

What is compared before compiled steps are trusted fits into the same: the first step of a fit is
the one that is compared, when the moments are zero. A run that goes on with an optimizer in use
holds copies of parameters and moments for the time of one step, ``3 N`` more. A guide with
parameters in between, or a model with tensors larger than its latents, takes what these take.
"""

from __future__ import annotations

import re

import torch

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_REQUEST = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB|TiB)")
# The CPU's allocator raises plain RuntimeErrors, in words that depend on the platform.
_CPU = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc")
_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _CPU.search(str(error)) is not None


def requested_bytes(error: BaseException) -> int | None:
    """The size of the allocation that failed, if ``error`` tells.

    >>> requested_bytes(RuntimeError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0"))
    1610612736
    """
    found = _REQUEST.search(str(error))
    return None if found is None else int(float(found.group(1)) * _UNITS[found.group(2)])


def floor_bytes(
    parameters: int, elements: int, at_once: int = 1, itemsize: int = 4, *, chunked: bool = False
) -> int:
    """What a run with Adam must hold; see above.

    Args:
        parameters: ``N``; of a mean-field guide two for each latent element.
        elements: ``D``, latent elements.
        at_once: particles that are evaluated at once.
        itemsize: bytes of a number.
        chunked: whether there are further particles.

    A mean-field guide of ten million elements:

    >>> in_words(floor_bytes(2 * 10**7, 10**7)), in_words(floor_bytes(2 * 10**7, 10**7, at_once=8))
    ('420 MiB', '687 MiB')
    """
    return itemsize * ((5 + chunked) * parameters + at_once * elements)


def available_bytes(error: BaseException) -> int | None:
    """How much memory is free on the device that ``error`` is about, if that can be told."""
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free_here = [free for free in (_in_machine(), _in_container()) if free is not None]
    return min(free_here, default=None)


def in_words(size: int) -> str:
    """A number of bytes as people write it.

    >>> in_words(1_500), in_words(3 * 2**30)
    ('1.46 KiB', '3 GiB')
    """
    unit = max((u for u in _UNITS if _UNITS[u] <= max(size, 1)), key=lambda u: _UNITS[u])
    return f"{size / _UNITS[unit]:.3g} {unit}"


def _in_machine() -> int | None:
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:  # not on Linux
        return None
    return None


def _in_container() -> int | None:
    try:
        with open(_CGROUP[0]) as limit, open(_CGROUP[1]) as used:
            return max(0, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return None
