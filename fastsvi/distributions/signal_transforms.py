"""Orthonormal transforms of sequences: discrete cosine and Haar. Their Jacobian is 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from fastsvi.distributions import constraints
from fastsvi.errors import ShapeError

__all__ = ["DiscreteCosineTransform", "HaarTransform"]


def dct(x: Tensor) -> Tensor:
    """Orthonormal DCT-II over the last dimension, as ``scipy.fft.dct(x, norm="ortho")``.

    One FFT of the same length: even entries, then odd ones backwards (Makhoul 1980).
    """
    spectrum = torch.fft.fft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1))
    angle, scale = _twiddle(x)
    return (spectrum.real * angle.cos() + spectrum.imag * angle.sin()) * scale


def idct(y: Tensor) -> Tensor:
    """Inverse of :func:`dct`."""
    angle, scale = _twiddle(y)
    y = y / scale
    # The FFT of a real sequence is fixed by its real part in the rotated frame: entry k of the
    # imaginary part is minus entry n - k of the real one.
    mirrored = torch.cat([torch.zeros_like(y[..., :1]), y[..., 1:].flip(-1)], -1)
    cos, sin = angle.cos(), angle.sin()
    spectrum = torch.complex(y * cos + mirrored * sin, y * sin - mirrored * cos)
    x = torch.fft.ifft(spectrum).real
    index = torch.arange(y.shape[-1], device=y.device)
    return x[..., torch.where(index % 2 == 0, index // 2, -1 - index // 2)]


def _twiddle(x: Tensor) -> tuple[Tensor, Tensor]:
    """Angles ``pi k / 2n`` and the factors that make the transform orthonormal, each ``(n,)``."""
    n = x.shape[-1]
    k = torch.arange(n, dtype=x.dtype, device=x.device)
    scale = torch.full_like(k, 2 / n).where(k > 0, 1 / n).sqrt()
    return k * (math.pi / (2 * n)), scale


def haar_transform(x: Tensor) -> Tensor:
    """Orthonormal Haar transform over the last dimension, of any length."""
    n = x.shape[-1] // 2
    even, odd, rest = x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2], x[..., 2 * n :]
    low, high = (even + odd) * math.sqrt(0.5), (even - odd) * math.sqrt(0.5)
    if n >= 2:
        low = haar_transform(low)
    return torch.cat([low, high, rest], -1)


def inverse_haar_transform(y: Tensor) -> Tensor:
    """Inverse of :func:`haar_transform`."""
    n = y.shape[-1] // 2
    low, high, rest = y[..., :n], y[..., n : 2 * n], y[..., 2 * n :]
    if n >= 2:
        low = inverse_haar_transform(low)
    pairs = torch.stack([low + high, low - high], -1) * math.sqrt(0.5)
    return torch.cat([pairs.flatten(-2), rest], -1)


class _AlongDim(Transform):
    """A linear map with Jacobian 1 over one dimension, counted from the right."""

    bijective = True

    def __init__(self, dim: int, cache_size: int) -> None:
        if not isinstance(dim, int) or dim >= 0:
            raise ValueError(f"{type(self).__name__}: dim must be a negative int, found {dim!r}")
        self.dim = dim
        super().__init__(cache_size=cache_size)

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> Any:
        return constraints.independent(constraints.real, -self.dim)

    codomain = domain

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(x.shape[: self.dim])

    def forward_shape(self, shape: Sequence[int]) -> Sequence[int]:
        if len(shape) < -self.dim:
            raise ShapeError(
                f"{type(self).__name__}(dim={self.dim}) needs at least {-self.dim} dimensions, "
                f"found shape {tuple(shape)}"
            )
        return shape

    inverse_shape = forward_shape


class DiscreteCosineTransform(_AlongDim):
    """Orthonormal cosine transform (type II) along ``dim``, which must be negative.

    ``smooth`` weights frequency ``f`` by ``f**smooth``, scaled so that the Jacobian stays 1. With 0
    white noise stays white; with 1 Brownian noise becomes white, with -1 violet noise does.
    """

    def __init__(self, dim: int = -1, smooth: float = 0.0, cache_size: int = 0) -> None:
        self.smooth = float(smooth)
        super().__init__(dim, cache_size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DiscreteCosineTransform):
            return False
        return self.dim == other.dim and self.smooth == other.smooth

    def __hash__(self) -> int:
        return hash((type(self), self.dim, self.smooth))

    def _weight(self, y: Tensor) -> Tensor:
        n = y.shape[-1]
        log_freq = (torch.arange(n, dtype=y.dtype, device=y.device) + 0.5).log()
        return ((log_freq - log_freq.mean()) * self.smooth).exp()

    def _call(self, x: Tensor) -> Tensor:
        y = dct(x.transpose(self.dim, -1))
        if self.smooth:
            y = y * self._weight(y)
        return y.transpose(self.dim, -1)

    def _inverse(self, y: Tensor) -> Tensor:
        y = y.transpose(self.dim, -1)
        if self.smooth:
            y = y / self._weight(y)
        return idct(y).transpose(self.dim, -1)

    def with_cache(self, cache_size: int = 1) -> DiscreteCosineTransform:
        if self._cache_size == cache_size:
            return self
        return DiscreteCosineTransform(self.dim, self.smooth, cache_size)


class HaarTransform(_AlongDim):
    """Orthonormal Haar wavelet transform along ``dim``, which must be negative.

    A length that is no power of two is split into blocks whose sizes shrink by halves from left
    to right. ``flip=True`` reverses the sequence first.
    """

    def __init__(self, dim: int = -1, flip: bool = False, cache_size: int = 0) -> None:
        self.flip = flip
        super().__init__(dim, cache_size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HaarTransform):
            return False
        return self.dim == other.dim and self.flip == other.flip

    def __hash__(self) -> int:
        return hash((type(self), self.dim, self.flip))

    def _call(self, x: Tensor) -> Tensor:
        x = x.transpose(self.dim, -1)
        y = haar_transform(x.flip(-1) if self.flip else x)
        return y.transpose(self.dim, -1)

    def _inverse(self, y: Tensor) -> Tensor:
        x = inverse_haar_transform(y.transpose(self.dim, -1))
        return (x.flip(-1) if self.flip else x).transpose(self.dim, -1)

    def with_cache(self, cache_size: int = 1) -> HaarTransform:
        return (
            self
            if self._cache_size == cache_size
            else HaarTransform(self.dim, self.flip, cache_size)
        )
