"""The tail of importance weights: a generalised Pareto fit, and the diagnostic k-hat made from it.

Importance weights ``w = p(x, z) / q(z)`` have about ``1/k`` finite moments, where ``k`` is the
shape of the generalised Pareto distribution that their largest values follow. Above ``k = 0.7``
their mean is dominated by a few draws, and the guide ``q`` misses mass that the posterior has.

- Zhang and Stephens, "A new and efficient estimation method for the generalized Pareto
  distribution", Technometrics 51 (2009).
- Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", JMLR 25 (2024).
- Yao, Vehtari, Simpson and Gelman, "Yes, but did it work?: Evaluating variational inference",
  ICML 2018.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from fastsvi.errors import FastSVIWarning, NonFiniteError, ShapeError, describe

MIN_TAIL = 10
# Weights that agree to one per cent have no tail to speak of: what is left of their spread is
# rounding, and a Pareto fit to rounding errors returns any number at all.
FLAT = 0.01
# Below this, relative to the largest weight, a draw tells nothing of the tail.
NEGLIGIBLE = math.log(1e-15)


def fit_generalized_pareto(
    exceedances: Tensor,  # [N], values above the threshold, less the threshold, all positive
) -> tuple[float, float]:
    """Shape ``k`` and scale ``sigma`` of the generalised Pareto distribution of ``exceedances``.

    The density is ``(1 + k x / sigma) ** (-1 / k - 1) / sigma``; ``k > 0`` is a heavy tail,
    ``k < 0`` a bounded one. The estimate is the posterior mean of Zhang and Stephens (2009), on a
    grid of ``30 + sqrt(N)`` points, pulled weakly towards 0.5 as by Vehtari et al. (2024).

    Raises:
        ShapeError: ``exceedances`` is not a vector of at least two values.

    >>> u = (torch.arange(1000) + 0.5).double() / 1000
    >>> k, sigma = fit_generalized_pareto((u**-0.5 - 1) / 0.5)  # quantiles for k = 0.5, sigma = 1
    >>> round(k, 1), round(sigma, 1)
    (0.5, 1.0)
    """
    if exceedances.dim() != 1 or exceedances.numel() < 2:
        raise ShapeError(
            f"a Pareto fit takes a vector of exceedances, found {describe(exceedances)}"
        )
    x = exceedances.detach().double().sort().values  # [N]
    num = x.numel()
    num_grid = 30 + int(math.sqrt(num))
    grid = torch.arange(1, num_grid + 1, dtype=x.dtype, device=x.device) - 0.5  # [M]
    quartile = x[int(num / 4 + 0.5) - 1]
    # theta = -k / sigma: one number describes the tail, and k follows from it in closed form.
    theta = 1 / x[-1] + (1 - (num_grid / grid).sqrt()) / (3 * quartile)  # [M]
    k = torch.log1p(-theta[:, None] * x).mean(-1)  # [M]
    log_likelihood = num * (torch.log(-theta / k) - k - 1)  # [M], profile over the grid
    best = float((theta * log_likelihood.softmax(0)).sum())
    shape = float(torch.log1p(-best * x).mean())
    return (shape * num + 0.5 * 10) / (num + 10), -shape / best


def tail_index(
    log_weights: Tensor,  # [S], log of unnormalised importance weights
) -> float:
    """k-hat: the shape of the generalised Pareto distribution of the largest weights.

    The tail is the ``min(0.2 S, 3 sqrt(S))`` largest of the ``S`` weights. Weights that agree to
    one per cent have none, and give 0; fewer than ten usable tail values give infinity and a
    warning.

    Raises:
        ShapeError: ``log_weights`` is not a vector.
        NonFiniteError: some weight is NaN or infinite, or all are zero.

    >>> tail_index(torch.zeros(1000))
    0.0
    """
    if log_weights.dim() != 1 or log_weights.numel() == 0:
        raise ShapeError(f"log_weights must be a vector, found {describe(log_weights)}")
    log_w = log_weights.detach().double()
    largest = log_w.max()
    if not torch.isfinite(largest) or torch.isnan(log_w).any():
        raise NonFiniteError(
            f"the log importance weights are not usable: {describe(log_weights)}. A NaN or +inf "
            "comes from a log-density of the model or the guide; all -inf means that no draw of "
            "the guide lies in the support of the model"
        )
    log_w = (log_w - largest).sort().values  # [S]
    if float(log_w[0]) > -FLAT:
        return 0.0
    num = log_w.numel()
    num_tail = math.ceil(min(0.2 * num, 3 * math.sqrt(num)))
    threshold = max(NEGLIGIBLE, float(log_w[max(num - num_tail - 1, 0)]))
    tail = log_w[log_w > threshold]
    if tail.numel() < MIN_TAIL:
        warnings.warn(
            f"k-hat cannot be estimated: {tail.numel()} weights lie in the tail, {MIN_TAIL} are "
            f"needed, of {num} draws. Draw more, or see that the guide covers the posterior",
            FastSVIWarning,
            stacklevel=2,
        )
        return math.inf
    return fit_generalized_pareto(tail.exp() - math.exp(threshold))[0]


def tail_index_limit(num_samples: int) -> float:
    """The k-hat above which weights are not to be trusted: ``min(0.7, 1 - 1 / log10(S))``.

    >>> tail_index_limit(1000), round(tail_index_limit(100), 2)
    (0.6666666666666667, 0.5)
    """
    return min(0.7, 1 - 1 / math.log10(max(num_samples, 11)))
