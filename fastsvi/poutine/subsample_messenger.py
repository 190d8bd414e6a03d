"""Subsampling: plates that stand for ``size`` independent parts and show a random few of them."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch

from fastsvi.distributions import Distribution
from fastsvi.distributions.noise import current_source
from fastsvi.errors import ShapeError, describe
from fastsvi.kernels.subsample import indices as random_subset
from fastsvi.poutine.errors import EmptyPlateError, PlateError
from fastsvi.poutine.indep_messenger import CondIndepStackFrame, IndepMessenger
from fastsvi.poutine.message import Message
from fastsvi.poutine.runtime import apply_stack, check_name
from fastsvi.poutine.validation import is_checking


class _Subsample(Distribution):
    """Distribution of a plate's indices: ``subsample_size`` of ``range(size)`` without repetition.

    Its log-density is zero, so that the scaled log-density under the plate is unbiased for the
    full one. (Pyro programs recognise the site by the name of this class.)
    """

    def __init__(
        self,
        size: int,
        subsample_size: int | None = None,
        use_cuda: bool | None = None,
        device: Any | None = None,
        name: str = "",
    ) -> None:
        self.name = name
        self.size = size
        self.subsample_size = size if subsample_size is None else subsample_size
        if use_cuda is not None:
            device = ("cuda" if use_cuda else "cpu") if device is None else device
            if use_cuda != (torch.device(device).type == "cuda"):
                raise PlateError(
                    f"use_cuda={use_cuda} contradicts device={str(device)!r}; use_cuda is "
                    "deprecated, give device alone"
                )
        self.device = device  # None is wherever torch makes tensors

    def sample(self) -> torch.Tensor:  # [subsample_size]
        if self.subsample_size == self.size:
            return full_indices(self.size, self.device)
        source = current_source()
        if source is not None:
            return source.subset(self.name, self.size, self.subsample_size, self.device)
        return draw_subset(self.size, self.subsample_size, self.device)

    def log_prob(self, value: Any) -> torch.Tensor:  # []
        return torch.zeros((), device=self.device)

    def __repr__(self) -> str:
        return f"_Subsample(size={self.size}, subsample_size={self.subsample_size})"


def full_indices(size: int, device: Any = None) -> torch.Tensor:  # [size]
    """``arange(size)``, recognised by :func:`is_full`."""
    indices = torch.arange(size, device=device)
    indices._is_full = True  # type: ignore[attr-defined]
    return indices


def stand_in(size: int, device: Any = None) -> torch.Tensor:  # [size]
    """In place of :func:`full_indices` at a site whose value nobody reads; it takes no memory.

    Who asks the plate for its indices gets the true ones.
    """
    indices = torch.zeros((), dtype=torch.int64, device=device).expand(size)
    indices._is_full = True  # type: ignore[attr-defined]
    return indices


def is_full(indices: Any) -> bool:
    """True for the result of :func:`full_indices`, whose entries are known without reading them."""
    return getattr(indices, "_is_full", False)


# From here on shuffling all indices costs more than the some hundred operations on the few.
_MAX_SHUFFLED = 1 << 17


def draw_subset(size: int, subsample_size: int, device: Any = None) -> torch.Tensor:
    """``subsample_size`` different numbers below ``size`` in random order, by torch's generator."""
    if size <= _MAX_SHUFFLED:
        return torch.randperm(size, device=device)[:subsample_size].clone()
    key = torch.randint(1 << 32, (2,), device=device)
    origin = torch.zeros(4, dtype=torch.int64, device=device)
    return random_subset(key, origin, 1, 1, size, subsample_size)[0, 0]


# So many indices are made anew when they are asked for.
MANY = 1 << 16


class SubsampleMessenger(IndepMessenger):
    """A plate that may show a random subset, and then scales log-densities by ``size / subset``."""

    def __init__(
        self,
        name: str,
        size: int | None = None,
        subsample_size: int | None = None,
        subsample: Any | None = None,
        dim: int | None = None,
        use_cuda: bool | None = None,
        device: Any | None = None,
    ) -> None:
        check_name(name, "plate")
        full_size, self.subsample_size, indices = self._subsample(
            name, size, subsample_size, subsample, use_cuda, device
        )
        super().__init__(name, full_size, dim, device)
        self._shows_all = is_full(indices)
        self._indices = None if self._shows_all and indices.stride() == (0,) else indices
        self._is_scaled = full_size != self.subsample_size

    @staticmethod
    def _subsample(
        name: str,
        size: int | None = None,
        subsample_size: int | None = None,
        subsample: Any | None = None,
        use_cuda: bool | None = None,
        device: Any | None = None,
    ) -> tuple[int, int, Any]:
        """Draw the indices at a site of the plate's name. Returns size, subset's size, indices."""
        if size is None:
            if subsample_size is not None or subsample is not None:
                raise PlateError(f"plate {name!r} subsamples, so it needs its full size too")
            return -1, -1, None  # any size
        size = _as_count(name, "size", size)
        if size == 0:
            raise EmptyPlateError(f"plate {name!r} has size zero; skip it if there is no data")
        if subsample_size is not None:
            subsample_size = _as_count(name, "subsample_size", subsample_size)
            if not 0 < subsample_size <= size:
                raise PlateError(
                    f"plate {name!r}: subsample_size must lie between 1 and size={size}, found "
                    f"{subsample_size}; for the last, smaller batch give min({subsample_size}, "
                    "size)"
                )
        fn = _Subsample(size, subsample_size, use_cuda, device, name)
        msg = Message("sample", name, fn, value=subsample)
        apply_stack(msg)
        count = len(msg.value)
        if subsample_size is not None and subsample_size != count:
            raise PlateError(
                f"plate {name!r}: subsample_size={subsample_size} does not match the {count} "
                "indices at hand; a guide and its model must use the same subsample_size, and with "
                "subsample=... it can be left out"
            )
        if count == 0:
            raise EmptyPlateError(f"plate {name!r}: the subsample is empty")
        return size, count, msg.value

    def __len__(self) -> int:
        """How many indices the plate shows: its subsample's size."""
        if self.size < 0:
            raise TypeError(f"plate {self.name!r} was made without a size")
        return self.subsample_size

    def __bool__(self) -> bool:
        return True

    def _sequence(self) -> Iterator[int]:
        # A loop over everything needs no tensor: nothing is read back, and a capture can trace it.
        return iter(range(self.size)) if self._shows_all else super()._sequence()

    @property
    def indices(self) -> Any:
        """The indices that the plate shows, ``[subsample_size]``."""
        if self._indices is None and self._shows_all:
            self._indices = full_indices(self.size, self.device)
        return super().indices

    def __exit__(self, *error: Any) -> Any:
        # Guides keep their plates, and eight bytes an index are twice what a parameter takes.
        if self._shows_all and self.size >= MANY:
            self._indices = None
        return super().__exit__(*error)

    def _reset(self) -> None:
        self._indices = None
        super()._reset()

    def _make_frame(self) -> CondIndepStackFrame:
        return CondIndepStackFrame(
            self.name, self.dim, self.subsample_size, self.counter, self.size
        )

    def _process_message(self, msg: Message) -> None:
        super()._process_message(msg)
        if self._is_scaled:
            msg.scale = msg.scale * self.size / self.subsample_size

    def _postprocess_message(self, msg: Message) -> None:
        if msg.type in ("param", "subsample") and self.dim is not None:
            event_dim = msg.kwargs.get("event_dim")
            if event_dim is not None:
                self._subsample_value(msg, self.dim - event_dim)

    def _subsample_value(self, msg: Message, dim: int) -> None:
        """Take the plate's indices of a value that has the plate's full size along ``dim``."""
        value = msg.value
        if value.dim() < -dim or value.shape[dim] == 1:
            return
        if self.size >= 0 and value.shape[dim] != self.size and is_checking():
            what = f"param {msg.name!r}" if msg.type == "param" else "the data given to subsample"
            raise ShapeError(
                f"inside plate({self.name!r}, {self.size}, dim={self.dim}) {what} must have size "
                f"{self.size} (or 1) along dim {dim}, found shape {tuple(value.shape)}; "
                f"event_dim={msg.kwargs['event_dim']} counts the rightmost dimensions that are no "
                "batch dimensions"
            )
        if not self._is_scaled:
            return
        indices = torch.as_tensor(self._indices, device=value.device)
        part = value.index_select(dim, indices)
        if msg.type == "param":
            self._note_rows(value, part, dim)
        msg.value = part

    def _note_rows(self, value: Any, part: Any, dim: int) -> None:
        """Note on a param's leaf which rows were used: optimizers for sparse updates look there."""
        if not hasattr(value, "unconstrained"):
            return  # a substituted value, which no optimizer updates
        leaf = value.unconstrained()
        if not hasattr(leaf, "_pyro_subsample"):
            leaf._pyro_subsample = {}
        leaf._pyro_subsample[dim] = self._indices
        part._pyro_unconstrained_param = leaf
        part.unconstrained = lambda: leaf


def _as_count(name: str, argument: str, value: Any) -> int:
    try:
        count = operator.index(value)
    except TypeError as error:
        raise PlateError(
            f"plate {name!r}: {argument} must be an integer, found {describe(value)}"
        ) from error
    if count < 0:
        raise PlateError(f"plate {name!r}: {argument} must not be negative, found {count}")
    return count
