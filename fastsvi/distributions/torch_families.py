"""The families of torch that need no lean form: torch's class plus Pyro's methods.

Most classes below are empty on purpose. Those that are not draw their noise in a way that
``torch.func.vmap`` can map, or say how their shapes follow from those of their arguments.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsvi.distributions import validation
from fastsvi.distributions.elementwise import Operand
from fastsvi.distributions.gamma import Beta, Chi2, Exponential, Gamma
from fastsvi.distributions.noise import (
    Source,
    categorical,
    current_source,
    draw,
    normal,
    uniform,
)
from fastsvi.distributions.normal import Normal
from fastsvi.distributions.stick_breaking import StickBreakingTransform
from fastsvi.distributions.torch_distribution import TorchDistribution
from fastsvi.distributions.transformed import DrawnDirectly, TransformedDistribution
from fastsvi.distributions.util import SCALAR, Shape
from fastsvi.distributions.values import Lenient, as_tensor

td = torch.distributions
ExponentialFamily = td.ExponentialFamily
"""torch's base of exponential families; it has no samples, so it gets no methods."""

Shapes = tuple[torch.Size, torch.Size]


# Over the integers ---------------------------------------------------------------------------


class Binomial(Lenient, td.Binomial, TorchDistribution):
    """Number of successes in ``total_count`` trials of probability ``probs`` (or ``logits``)."""

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw of counts, shape ``sample_shape + batch_shape``."""
        shape = self.shape(sample_shape)
        with torch.no_grad():
            return draw(torch.binomial, self.total_count.expand(shape), self.probs.expand(shape))


class NegativeBinomial(Lenient, td.NegativeBinomial, TorchDistribution):
    """Number of successes before ``total_count`` failures; ``probs`` is that of a success."""

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw of counts, shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            rate = Gamma(self.total_count, (-self.logits).exp(), validate_args=False)
            return torch.poisson(rate.sample(sample_shape))


class Multinomial(Lenient, td.Multinomial, TorchDistribution):
    """Counts ``(..., K)`` of the categories in ``total_count`` (an int) categorical draws."""

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw of counts, shape ``sample_shape + batch_shape + (K,)``."""
        shape = torch.Size((self.total_count,)) + torch.Size(sample_shape)
        draws = _categories(self._categorical, shape).movedim(0, -1)
        zeros = torch.zeros((*draws.shape[:-1], self.event_shape[0])).to(draws)
        return zeros.scatter_add(-1, draws, torch.ones_like(draws)).to(self.probs.dtype)

    def log_prob(self, value: Any) -> Tensor:
        """Log-probability of ``value``; shape ``sample_shape + batch_shape``."""
        value = as_tensor(self, value)
        if self._validate_args:
            self._validate_sample(value)
        # A category that is impossible and was not seen adds 0, not 0 times infinity.
        irrelevant = (value == 0) & (self.logits == -math.inf)
        terms = value * torch.where(irrelevant, 0.0, self.logits) - (value + 1).lgamma()
        return terms.sum(-1) + (value.sum(-1) + 1).lgamma()

    @classmethod
    def infer_shapes(cls, total_count: Any = None, probs: Any = None, logits: Any = None) -> Shapes:  # type: ignore[override]
        """See :meth:`TorchDistributionMixin.infer_shapes`."""
        shape = torch.Size(probs if logits is None else logits)
        counts = tuple(total_count) if isinstance(total_count, (tuple, list)) else ()
        return torch.broadcast_shapes(shape[:-1], counts), shape[-1:]


class OneHotCategorical(Lenient, td.OneHotCategorical, TorchDistribution):
    """Categories as one-hot vectors ``(..., K)``."""

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A one-hot draw, shape ``sample_shape + batch_shape + (K,)``."""
        index = _categories(self._categorical, torch.Size(sample_shape)).unsqueeze(-1)
        categories = torch.arange(self.event_shape[0], device=index.device)
        return (index == categories).to(self.probs.dtype)

    @classmethod
    def infer_shapes(cls, probs: Any = None, logits: Any = None) -> Shapes:  # type: ignore[override]
        """See :meth:`TorchDistributionMixin.infer_shapes`."""
        shape = torch.Size(probs if logits is None else logits)
        return shape[:-1], shape[-1:]


class OneHotCategoricalStraightThrough(td.OneHotCategoricalStraightThrough, OneHotCategorical):
    """One-hot vectors whose gradient is that of the probabilities (Bengio et al. 2013)."""


# On the line ---------------------------------------------------------------------------------


class ContinuousBernoulli(Lenient, td.ContinuousBernoulli, TorchDistribution):
    """Continuous Bernoulli on [0, 1] (Loaiza-Ganem and Cunningham 2019)."""

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to ``probs``, shape ``sample_shape + batch_shape``."""
        return self.icdf(uniform(self.shape(sample_shape), self.probs.dtype, self.probs.device))

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw without gradient, shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            return self.rsample(sample_shape)


class FisherSnedecor(Lenient, td.FisherSnedecor, TorchDistribution):
    """F distribution with ``df1`` and ``df2`` degrees of freedom."""

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to both parameters, shape ``sample_shape + batch_shape``."""
        above = Gamma(0.5 * self.df1, self.df1, validate_args=False).rsample(sample_shape)
        below = Gamma(0.5 * self.df2, self.df2, validate_args=False).rsample(sample_shape)
        return above / below


if hasattr(td, "GeneralizedPareto"):  # torch >= 2.10

    class GeneralizedPareto(Lenient, td.GeneralizedPareto, TorchDistribution):
        """Generalised Pareto distribution of excesses over a threshold ``loc``."""

        def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
            """A draw with gradients to all parameters, shape ``sample_shape + batch_shape``."""
            return self.icdf(uniform(self.shape(sample_shape), self.loc.dtype, self.loc.device))

        def log_survival_function(self, value: Any) -> Tensor:
            """Log-probability of more than ``value``."""
            # torch compares the concentration with a float32 zero, which fails in float64.
            value = as_tensor(self, value)
            if self._validate_args:
                self._validate_sample(value)
            z, k = (value - self.loc) / self.scale, self.concentration
            nonzero = torch.where(k == 0, 1.0, k)
            return torch.where(k == 0, -z, -(nonzero * z).log1p() / nonzero)

        def icdf(self, value: Any) -> Tensor:
            """Value below which the probability is ``value``."""
            log_survival, k = (-as_tensor(self, value)).log1p(), self.concentration
            nonzero = torch.where(k == 0, 1.0, k)
            z = torch.where(k == 0, -log_survival, (-nonzero * log_survival).expm1() / nonzero)
            return self.loc + self.scale * z

        def log_prob(self, value: Any) -> Tensor:
            """Log-density of ``value``; shape ``sample_shape + batch_shape``."""
            return (1 + self.concentration) * self.log_survival_function(value) - self.scale.log()


class Gumbel(Lenient, td.Gumbel, DrawnDirectly):
    """Gumbel distribution with mode ``loc`` and ``scale > 0``."""

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to both parameters, shape ``sample_shape + batch_shape``."""
        source = current_source()
        if source is None:
            return super().rsample(torch.Size(sample_shape))
        noise = _gumbel(source, self.shape(sample_shape), self.loc)
        return self.loc + self.scale * noise


class InverseGamma(Lenient, td.InverseGamma, DrawnDirectly):
    """Distribution of ``1 / x`` for ``x ~ Gamma(concentration, rate)``."""

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to both parameters, shape ``sample_shape + batch_shape``."""
        gamma = Gamma(self.concentration, self.rate, validate_args=False)
        return gamma.rsample(sample_shape).reciprocal()


class Kumaraswamy(Lenient, td.Kumaraswamy, DrawnDirectly):
    """Kumaraswamy distribution on (0, 1), a beta look-alike with a closed-form quantile."""

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to both parameters, shape ``sample_shape + batch_shape``."""
        source = current_source()
        if source is None:
            return super().rsample(torch.Size(sample_shape))
        a, b = self.concentration1, self.concentration0
        log_u = source.uniform(self.shape(sample_shape), a.dtype, a.device).log()
        return (-(log_u / b).expm1()).pow(a.reciprocal())


class Pareto(Lenient, td.Pareto, DrawnDirectly):  # type: ignore[misc]
    """Pareto distribution with minimum ``scale`` and tail index ``alpha``."""

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to both parameters, shape ``sample_shape + batch_shape``."""
        noise = Exponential(self.alpha, validate_args=False).rsample(sample_shape)
        return self.scale * noise.exp()


class VonMises(Lenient, td.VonMises, TorchDistribution):
    """Von Mises distribution of an angle, with mean direction ``loc`` and ``concentration > 0``."""

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw of angles in [-pi, pi), shape ``sample_shape + batch_shape``."""

        def until_all_accepted(loc: Tensor, concentration: Tensor) -> Tensor:
            return td.VonMises(loc, concentration, validate_args=False).sample()

        shape = self.shape(sample_shape)
        with torch.no_grad():
            return draw(
                until_all_accepted, self.loc.expand(shape), self.concentration.expand(shape)
            )

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        shape, new = torch.Size(batch_shape), self._get_checked_instance(VonMises, _instance)
        loc, concentration = self.loc.expand(shape), self.concentration.expand(shape)
        td.VonMises.__init__(new, loc, concentration, validate_args=False)
        new._validate_args = self._validate_args
        return new


class Weibull(Lenient, td.Weibull, DrawnDirectly):
    """Weibull distribution with ``scale > 0`` and shape ``concentration > 0``."""

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to both parameters, shape ``sample_shape + batch_shape``."""
        unit = Exponential(torch.ones_like(self.scale), validate_args=False)
        return self.scale * unit.rsample(sample_shape).pow(self.concentration_reciprocal)


# On the simplex, relaxations -----------------------------------------------------------------


class LogisticNormal(Lenient, td.LogisticNormal, TransformedDistribution):
    """Stick-breaking image, on the simplex, of independent normals ``(..., K - 1)``."""

    def __init__(self, loc: Operand, scale: Operand, validate_args: bool | None = None) -> None:
        base = Normal(loc, scale, validate_args=validate_args)
        if not base.batch_shape:
            base = base.expand([1])
        TransformedDistribution.__init__(self, base, StickBreakingTransform(), validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        new = object.__new__(type(self)) if _instance is None else _instance
        return super().expand(batch_shape, new)


class RelaxedBernoulli(Lenient, td.RelaxedBernoulli, DrawnDirectly):
    """Bernoulli relaxed to (0, 1) at a ``temperature`` (Maddison et al. 2016)."""

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to both parameters, shape ``sample_shape + batch_shape``."""
        source = current_source()
        if source is None:
            return super().rsample(torch.Size(sample_shape))
        logits = self.logits
        u = source.uniform(self.shape(sample_shape), logits.dtype, logits.device)
        return self._push((logits + u.log() - (-u).log1p()) / self.temperature)


class RelaxedOneHotCategorical(Lenient, td.RelaxedOneHotCategorical, DrawnDirectly):
    """One-hot vectors relaxed to the simplex at a ``temperature`` (Jang et al. 2016)."""

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to both parameters, ``sample_shape + batch_shape + (K,)``."""
        source = current_source()
        if source is None:
            return super().rsample(torch.Size(sample_shape))
        noise = _gumbel(source, self.shape(sample_shape), self.logits)
        scores = (self.logits + noise) / self.temperature
        return self._push(scores - scores.logsumexp(-1, keepdim=True))


# Vectors and matrices ------------------------------------------------------------------------


class MultivariateNormal(Lenient, td.MultivariateNormal, TorchDistribution):
    """Normal vectors with mean ``loc`` ``(..., D)`` and a covariance, precision or its Cholesky."""

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw with gradients to all parameters, ``sample_shape + batch_shape + (D,)``."""
        noise = normal(self.shape(sample_shape), self.loc.dtype, self.loc.device)
        return self.loc + _matvec(self._unbroadcasted_scale_tril, noise)

    @classmethod
    def infer_shapes(  # type: ignore[override]
        cls,
        loc: Any,
        covariance_matrix: Any = None,
        precision_matrix: Any = None,
        scale_tril: Any = None,
    ) -> Shapes:
        """See :meth:`TorchDistributionMixin.infer_shapes`."""
        shape = torch.Size(loc)
        given = (covariance_matrix, precision_matrix, scale_tril)
        batches = [tuple(matrix)[:-2] for matrix in given if matrix is not None]
        return torch.broadcast_shapes(shape[:-1], *batches), shape[-1:]


class LKJCholesky(Lenient, td.LKJCholesky, TorchDistribution):
    """Cholesky factors of correlation matrices, density ``det(L L.T)**(concentration - 1)``."""

    def __init__(
        self, dim: int, concentration: Operand = 1.0, validate_args: bool | None = None
    ) -> None:
        if self._validate_args if validate_args is None else validate_args:
            # torch would complain about the Beta distribution that it makes of it.
            given = {"concentration": concentration}
            validation.check_arguments("LKJCholesky", given, self.arg_constraints)
        super().__init__(dim, concentration, validate_args)
        # torch's own Beta cannot be drawn from under vmap.
        marginals = self._beta
        self._beta = Beta(marginals.concentration1, marginals.concentration0, validate_args=False)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        new = object.__new__(type(self)) if _instance is None else _instance
        return super().expand(batch_shape, new)


class Wishart(Lenient, td.Wishart, TorchDistribution):
    """Wishart distribution of positive definite matrices, with mean ``df * covariance_matrix``."""

    def rsample(self, sample_shape: Shape = SCALAR, max_try_correction: Any = None) -> Tensor:
        """A draw with gradients, ``sample_shape + batch_shape + (D, D)`` (Bartlett 1933).

        torch's own draws again up to ten times, whenever a draw is *not* singular.
        """
        dim, like = self.event_shape[0], self._unbroadcasted_scale_tril
        df = self.df.unsqueeze(-1) - torch.arange(dim, dtype=like.dtype, device=like.device)
        df = df.expand((*self._batch_shape, dim))
        diagonal = Chi2(df, validate_args=False).rsample(sample_shape).sqrt()
        noise = normal(self.shape(sample_shape), like.dtype, like.device)
        factor = like @ (noise.tril(-1) + diagonal.diag_embed())
        return factor @ factor.mT


class MixtureSameFamily(Lenient, td.MixtureSameFamily, TorchDistribution):
    """Mixture over the rightmost batch dimension of a component distribution."""


def _categories(family: td.Categorical, sample_shape: torch.Size) -> Tensor:
    source = current_source()
    if source is None:
        return family.sample(sample_shape)
    return categorical(family.probs, sample_shape + family.batch_shape, source)


def _gumbel(source: Source, shape: Shape, like: Tensor) -> Tensor:
    # Of -log(-log(1 - u)), so that the long tail is made of the small u, with the finer grain.
    u = source.uniform(shape, like.dtype, like.device)
    return -(-(-u).log1p()).log()


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _wrap_newcomers() -> list[str]:
    """Give the methods to families that this torch has and the list above does not know."""
    added = []
    for name in td.__all__:
        family = getattr(td, name)
        if not isinstance(family, type) or not issubclass(family, td.Distribution):
            continue
        if name in globals() or name in _DEFINED_ELSEWHERE:
            continue
        bases = (Lenient, family, TorchDistribution)
        globals()[name] = type(name, bases, {"__module__": __name__, "__doc__": family.__doc__})
        added.append(name)
    return added


# Families that have a file of their own, with others of their kind.
_DEFINED_ELSEWHERE = frozenset(
    {
        "Bernoulli",
        "Beta",
        "Categorical",
        "Cauchy",
        "Chi2",
        "Dirichlet",
        "Distribution",
        "Exponential",
        "Gamma",
        "Geometric",
        "HalfCauchy",
        "HalfNormal",
        "Independent",
        "Laplace",
        "LogNormal",
        "LowRankMultivariateNormal",
        "Normal",
        "Poisson",
        "StudentT",
        "TransformedDistribution",
        "Uniform",
    }
)

__all__ = [
    "Binomial",
    "ContinuousBernoulli",
    "ExponentialFamily",
    "FisherSnedecor",
    "Gumbel",
    "InverseGamma",
    "Kumaraswamy",
    "LKJCholesky",
    "LogisticNormal",
    "MixtureSameFamily",
    "Multinomial",
    "MultivariateNormal",
    "NegativeBinomial",
    "OneHotCategorical",
    "OneHotCategoricalStraightThrough",
    "Pareto",
    "RelaxedBernoulli",
    "RelaxedOneHotCategorical",
    "VonMises",
    "Weibull",
    "Wishart",
]
if hasattr(td, "GeneralizedPareto"):
    __all__ += ["GeneralizedPareto"]
__all__ += _wrap_newcomers()
