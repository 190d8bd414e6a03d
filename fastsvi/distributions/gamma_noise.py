"""Gamma variables from a fixed count of random numbers, with pathwise gradients.

torch draws them by rejection until one is accepted, which no counter can foresee, and takes their
gradient by a special function that only torch has. Here a fixed number of candidates is drawn, of
which the first accepted is taken, and the gradient is an integral; all of it in elementary
operations that work under vmap and in every capture.

- Candidates: G. Marsaglia and W. W. Tsang, "A simple method for generating gamma variables", ACM
  TOMS 2000. One is accepted with probability 0.95 or more, so all eight fail once in 4e10 draws;
  the last is taken then.
- Gradients: implicit, ``dx/da = -(dF/da) / p`` (Figurnov, Mohamed and Mnih, "Implicit
  reparameterization gradients", NeurIPS 2018).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastsvi.distributions.noise import Source, current_source
from fastsvi.distributions.util import Shape

__all__ = ["dirichlet_draw", "log_gamma_draw", "source_for"]

_CANDIDATES = 8
# A draw takes some 20 random numbers and 20 points of an integral. From here on, torch's way is
# worth more than a capture.
_MOST_ELEMENTS = 1 << 14

_POINTS = 20
_REACH = 20.0  # the integrand has fallen to exp(-_REACH) where it is cut off


def source_for(shape: Shape) -> Source | None:
    """The source to draw so many gamma variables from; None is torch's generator."""
    return current_source() if math.prod(shape) <= _MOST_ELEMENTS else None


def log_gamma_draw(concentration: Tensor, source: Source) -> Tensor:
    """Logarithms of gamma variables of rate 1, one for each concentration."""
    a = concentration
    shape, dtype, device = a.shape, a.dtype, a.device
    # For a < 1, x(a) = x(a + 1) u**(1 / a); the logarithm holds it where x itself would be 0.
    is_small = a < 1
    raised = torch.where(is_small, a + 1, a)
    log_x = _draw(raised.detach(), source)
    if torch.is_grad_enabled():
        slope = _slope(raised.detach(), log_x)
        log_x = log_x + (raised - raised.detach()) * slope
    log_u = source.uniform(shape, dtype, device).log()
    return torch.where(is_small, log_x + log_u / a, log_x)


def dirichlet_draw(concentration: Tensor, source: Source) -> Tensor:
    """One draw for each concentration ``(..., K)``, strictly inside the simplex."""
    x = log_gamma_draw(concentration, source).softmax(-1)
    limits = torch.finfo(x.dtype)
    return x.clamp(limits.tiny, 1 - limits.eps / 2)


def _draw(a: Tensor, source: Source) -> Tensor:
    """Logarithm of the first accepted candidate; ``a >= 1``."""
    many = (_CANDIDATES, *a.shape)
    z = source.normal(many, a.dtype, a.device)
    log_u = source.uniform(many, a.dtype, a.device).log()
    d = a - 1 / 3
    root = 1 + z / (9 * d).sqrt()
    is_valid = root > 0
    log_v = 3 * torch.where(is_valid, root, 1.0).log()
    is_accepted = is_valid & (log_u < 0.5 * z.square() + d * (1 - log_v.exp() + log_v))
    *earlier, chosen = log_v.unbind()
    for log_one, is_taken in zip(
        reversed(earlier), reversed(is_accepted[:-1].unbind()), strict=True
    ):
        chosen = torch.where(is_taken, log_one, chosen)
    return d.log() + chosen


# By dtype and device: points and weights of Gauss and Legendre's rule on the unit interval.
_rules: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}


def _rule(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    if (dtype, device) not in _rules:
        points, weights = np.polynomial.legendre.leggauss(_POINTS)
        both = ((points + 1) / 2).tolist(), (weights / 2).tolist()
        places, shares = (torch.tensor(x, dtype=dtype, device=device) for x in both)
        _rules[dtype, device] = places, shares
    return _rules[dtype, device]


def _slope(a: Tensor, log_x: Tensor) -> Tensor:
    """``d log x / da`` of a gamma variable at a fixed quantile; ``a >= 1``.

    With ``t = x exp(-s)`` below ``a``, and ``t = x exp(s)`` above, ``-(dF/da) / (x p)`` is the
    integral over ``s > 0`` of ``exp(-|a - x| s - x r(s)) (s +- (digamma(a) - log x))`` with
    ``r(s) = exp(-+s) - 1 +- s``: smooth, without cancellation, and of a width that is known.
    """
    x = log_x.exp()
    is_below = x < a
    distance = (a - x).abs()
    # Where the exponent has reached -_REACH at the latest, as r(s) >= s**2 / (2 + s) below, and
    # r(s) >= s**2 / 2 above.
    below = 2 * distance - _REACH
    below = 4 * _REACH / (below + (below.square() + 8 * _REACH * a).sqrt())
    above = 2 * _REACH / (distance + (distance.square() + 2 * _REACH * x).sqrt())
    end = torch.where(is_below, below, above)
    places, shares = _rule(a.dtype, a.device)
    s = end.unsqueeze(-1) * places
    side = torch.where(is_below, -1.0, 1.0).to(a.dtype).unsqueeze(-1)
    rest = torch.expm1(side * s) - side * s
    weight = (-distance.unsqueeze(-1) * s - x.unsqueeze(-1) * rest).exp()
    offset = torch.where(is_below, a.digamma() - log_x, log_x - a.digamma())
    return end * (weight * (s + offset.unsqueeze(-1)) * shares).sum(-1)
