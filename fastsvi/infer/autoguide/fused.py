"""All sites of a mean-field guide drawn in one operation, from two slabs of the flat buffer.

The parameters of the guide are arranged in the buffer so that all locs lie side by side, and all
unconstrained scales; sites with the same elementwise transform are neighbours. A draw is then one
kernel, one transform for each kind of support, and views. Gradients arrive in the flat gradient,
of which the gradient of every leaf is a view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transforms

from fastsvi.engine.noise import NoiseStream, RecordedNoise
from fastsvi.kernels import normal
from fastsvi.params.buffer import Buffer
from fastsvi.poutine.runtime import PARAM_STORE

_grad_of = attrgetter("grad")
_UNBOUND = object()

# Elementwise transforms without parameters: sites that share one are transformed together.
_SHARED = (transforms.ExpTransform, transforms.SigmoidTransform, transforms.SoftplusTransform)


@dataclass(frozen=True)
class Slot:
    """A latent site: names of its parameters in the store, and what is known of the site."""

    name: str
    loc: str
    scale: str
    shape: torch.Size
    transform: Any
    plates: tuple[Any, ...]

    @property
    def numel(self) -> int:
        return self.shape.numel()


@dataclass(frozen=True)
class _Piece:
    """Neighbouring elements that one transform maps: a site, or several that share it."""

    slots: tuple[Slot, ...]
    transform: Any = None  # None for the identity
    shape: torch.Size | None = None  # that the transform must see; None if it is elementwise

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(slot.numel for slot in self.slots)

    def constrain(self, x: Tensor, batch: tuple[int, ...]) -> tuple[dict[str, Tensor], Any]:
        """Values of the sites at elements ``x`` ``[*batch, n]``, and log |det J| ``[*batch]``."""
        if self.transform is None:
            (slot,) = self.slots
            return {slot.name: x.view((*batch, *slot.shape))}, None
        if self.shape is not None:
            x = x.view((*batch, *self.shape))
        y = self.transform(x)
        log_det = self.transform.log_abs_det_jacobian(x, y)
        log_det = log_det.reshape((*batch, -1)).sum(-1) if batch else log_det.sum()
        if self.shape is not None:
            return {self.slots[0].name: y}, log_det
        parts = y.split(self.sizes, -1) if len(self.slots) > 1 else (y,)
        values = {
            slot.name: part.view((*batch, *slot.shape))
            for slot, part in zip(self.slots, parts, strict=True)
        }
        return values, log_det


class FusedNormal:
    """Draws the sites of a mean-field normal guide.

    Args:
        slots: the sites.
        scale_map: from unconstrained scale to scale.
        are_own: whether the store's leaves of some names are those that the guide would read.

    Attributes:
        leaves: the parameters, unconstrained.
        plates: the plates of every site.
        slots: the sites in the order of their elements.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        scale_map: normal.ScaleMap,
        are_own: Callable[[Sequence[str], Sequence[Tensor]], bool],
    ) -> None:
        self._are_own = are_own
        self._pieces = _pieces(slots)
        self.slots = [slot for piece in self._pieces for slot in piece.slots]
        self.plates = {slot.name: slot.plates for slot in self.slots}
        self.scale_map = scale_map
        self.num_elements = sum(slot.numel for slot in self.slots)
        self._sizes = tuple(sum(piece.sizes) for piece in self._pieces)
        self._loc_names = [slot.loc for slot in self.slots]
        self._scale_names = [slot.scale for slot in self.slots]
        self.leaves: tuple[Tensor, ...] = ()
        self._buffer: Buffer | None = None
        self._versions = (-1, -1)
        self._grads: list[Any] = []  # of the leaves, when they were last bound

    def refresh(self) -> bool:
        """Find the slabs again if the store has changed; False if the guide cannot be fused."""
        buffer = self._buffer
        if buffer is not None:
            buffer.sync()  # somebody may have given a leaf other memory
        if buffer is None or self._versions != (PARAM_STORE.version, buffer.version):
            buffer = self._buffer = self._find_slabs()
            if buffer is None:
                return False
        if not all(map(is_, map(_grad_of, self.leaves), self._grads)):
            buffer.bind_grads()
            self._grads = list(map(_grad_of, self.leaves))
        return all(leaf.requires_grad and not leaf._backward_hooks for leaf in self.leaves)

    def _find_slabs(self) -> Buffer | None:
        names = [*self._loc_names, *self._scale_names]
        if any(name not in PARAM_STORE for name in names):
            return None
        self.leaves = tuple(PARAM_STORE.leaf(name) for name in names)
        if not self._are_own(names, self.leaves):
            return None
        places = [PARAM_STORE.locate(leaf) for leaf in self.leaves]
        buffers = {id(place[0]): place[0] for place in places if place is not None}
        if None in places or len(buffers) != 1:
            return None
        (buffer,) = buffers.values()
        if buffer.dtype not in (torch.float32, torch.float64):
            return None
        buffer.arrange(self._loc_names)
        buffer.arrange(self._scale_names)
        # Arranging the scales may have moved the locs.
        self._loc = _slab(buffer, buffer.arrange(self._loc_names))
        self._raw_scale = _slab(buffer, buffer.arrange(self._scale_names))
        self._versions = PARAM_STORE.version, buffer.version
        self._grads = [_UNBOUND] * len(self.leaves)
        return buffer

    def draw(
        self, num_particles: int, stream: NoiseStream | RecordedNoise, first: int = 0
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Constrained values by site name, and log q of them, for the particles from ``first`` on.

        With one particle values have the shape of their sites, and log q is a scalar; with more
        both have a leading particle axis.
        """
        loc = self._loc
        elements, device = self.num_elements, loc.device
        key, origin, noise = stream.draw(num_particles, elements, loc.dtype, device, first)
        z, log_q = normal.sample(
            loc, self._raw_scale, key, origin, num_particles, self.scale_map, noise=noise
        )
        batch = () if num_particles == 1 else (num_particles,)
        log_q = log_q.view(batch)
        values: dict[str, Tensor] = {}
        z = z.view((*batch, self.num_elements))
        for piece, part in zip(self._pieces, z.split(self._sizes, -1), strict=True):
            found, log_det = piece.constrain(part, batch)
            values.update(found)
            if log_det is not None:
                log_q = log_q - log_det
        return values, log_q


def _slab(buffer: Buffer, where: slice) -> Tensor:
    """A leaf ``[1, D]`` over part of the buffer, its gradient that part of the flat gradient."""
    slab = buffer.flat[where].detach().unsqueeze(0).requires_grad_()
    slab.grad = buffer.grad[where].unsqueeze(0)
    return slab


def _pieces(slots: Sequence[Slot]) -> list[_Piece]:
    """Cut the slots into pieces, bringing those together that share an elementwise transform."""
    plain, structured = [], []
    shared: dict[type, tuple[Any, list[Slot]]] = {}
    for slot in slots:
        transform = _simplest(slot.transform)
        if transform is None:
            plain.append(_Piece((slot,)))
        elif isinstance(transform, _SHARED):
            shared.setdefault(type(transform), (transform, []))[1].append(slot)
        else:
            structured.append(_Piece((slot,), slot.transform, slot.shape))
    together = [_Piece(tuple(members), transform) for transform, members in shared.values()]
    return plain + together + structured


def _simplest(transform: Any) -> Any:
    """``transform`` on single elements, without parts that do nothing; None for the identity."""
    while isinstance(transform, transforms.IndependentTransform):
        transform = transform.base_transform
    if isinstance(transform, transforms.ComposeTransform):
        # torch writes "not negative" as exp, then 0 + 1 * x.
        parts = [part for part in map(_simplest, transform.parts) if part is not None]
        return parts[0] if len(parts) == 1 else transform if parts else None
    if isinstance(transform, transforms.AffineTransform):
        constants = transform.loc, transform.scale
        if not any(isinstance(c, Tensor) for c in constants) and constants == (0, 1):
            return None
    return transform


def is_subsampled(plates: Sequence[Any]) -> bool:
    """Whether one of the plates shows only part of what it stands for."""
    return any((frame.full_size or frame.size) != frame.size for frame in plates)
