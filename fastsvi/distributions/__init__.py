"""Distributions: torch's families with Pyro's methods, and the families that torch lacks.

``import fastsvi.distributions as dist`` replaces ``import pyro.distributions as dist``. Every
class derives from torch's class of the same name where there is one.

>>> import torch, fastsvi.distributions as dist
>>> d = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
>>> d.batch_shape, d.event_shape, d().shape
(torch.Size([]), torch.Size([3]), torch.Size([3]))
>>> isinstance(dist.Normal(0.0, 1.0), torch.distributions.Normal)
True
"""

from __future__ import annotations

from typing import Any

from torch.distributions import biject_to, transform_to

from fastsvi.distributions import constraints, kl, torch_families, transforms, util
from fastsvi.distributions.conjugate import BetaBinomial, DirichletMultinomial, GammaPoisson
from fastsvi.distributions.delta import Delta, Unit
from fastsvi.distributions.derived_families import (
    AffineBeta,
    ExtendedBetaBinomial,
    ExtendedBinomial,
    FoldedDistribution,
    NanMaskedMultivariateNormal,
    NanMaskedNormal,
)
from fastsvi.distributions.discrete import Bernoulli, Categorical, Geometric, Poisson
from fastsvi.distributions.distribution import Distribution
from fastsvi.distributions.empirical import Empirical
from fastsvi.distributions.gamma import Beta, Chi2, Dirichlet, Exponential, Gamma
from fastsvi.distributions.heavy_tailed import Cauchy, HalfCauchy, Laplace, StudentT
from fastsvi.distributions.improper_uniform import ImproperUniform
from fastsvi.distributions.kl import kl_divergence, register_kl
from fastsvi.distributions.lkj import LKJ, LKJCorrCholesky
from fastsvi.distributions.low_rank_normal import LowRankMultivariateNormal
from fastsvi.distributions.mixture import MaskedMixture
from fastsvi.distributions.multivariate import MultivariateStudentT, ProjectedNormal
from fastsvi.distributions.normal import HalfNormal, LogNormal, Normal
from fastsvi.distributions.ordered_logistic import OrderedLogistic
from fastsvi.distributions.relaxed import (
    RelaxedBernoulliStraightThrough,
    RelaxedOneHotCategoricalStraightThrough,
)
from fastsvi.distributions.score_parts import ScoreParts
from fastsvi.distributions.smooth import (
    AsymmetricLaplace,
    Logistic,
    SkewLogistic,
    SoftAsymmetricLaplace,
    SoftLaplace,
)
from fastsvi.distributions.torch_distribution import (
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
    TorchDistribution,
    TorchDistributionMixin,
)
from fastsvi.distributions.torch_families import (
    Binomial,
    ContinuousBernoulli,
    ExponentialFamily,
    FisherSnedecor,
    Gumbel,
    InverseGamma,
    Kumaraswamy,
    LKJCholesky,
    LogisticNormal,
    MixtureSameFamily,
    Multinomial,
    MultivariateNormal,
    NegativeBinomial,
    OneHotCategorical,
    OneHotCategoricalStraightThrough,
    Pareto,
    RelaxedBernoulli,
    RelaxedOneHotCategorical,
    VonMises,
    Weibull,
    Wishart,
)
from fastsvi.distributions.transformed import TransformedDistribution
from fastsvi.distributions.transforms import ComposeTransformModule, TransformModule
from fastsvi.distributions.uniform import Uniform
from fastsvi.distributions.util import (
    enable_validation,
    is_validation_enabled,
    validation_enabled,
)
from fastsvi.distributions.zero_inflated import (
    ZeroInflatedDistribution,
    ZeroInflatedNegativeBinomial,
    ZeroInflatedPoisson,
)

__all__ = [
    "LKJ",
    "AffineBeta",
    "AsymmetricLaplace",
    "Bernoulli",
    "Beta",
    "BetaBinomial",
    "Binomial",
    "Categorical",
    "Cauchy",
    "Chi2",
    "ComposeTransformModule",
    "ContinuousBernoulli",
    "Delta",
    "Dirichlet",
    "DirichletMultinomial",
    "Distribution",
    "Empirical",
    "ExpandedDistribution",
    "Exponential",
    "ExponentialFamily",
    "ExtendedBetaBinomial",
    "ExtendedBinomial",
    "FisherSnedecor",
    "FoldedDistribution",
    "Gamma",
    "GammaPoisson",
    "Geometric",
    "Gumbel",
    "HalfCauchy",
    "HalfNormal",
    "ImproperUniform",
    "Independent",
    "InverseGamma",
    "Kumaraswamy",
    "LKJCholesky",
    "LKJCorrCholesky",
    "Laplace",
    "LogNormal",
    "Logistic",
    "LogisticNormal",
    "LowRankMultivariateNormal",
    "MaskedDistribution",
    "MaskedMixture",
    "MixtureSameFamily",
    "Multinomial",
    "MultivariateNormal",
    "MultivariateStudentT",
    "NanMaskedMultivariateNormal",
    "NanMaskedNormal",
    "NegativeBinomial",
    "Normal",
    "OneHotCategorical",
    "OneHotCategoricalStraightThrough",
    "OrderedLogistic",
    "Pareto",
    "Poisson",
    "ProjectedNormal",
    "RelaxedBernoulli",
    "RelaxedBernoulliStraightThrough",
    "RelaxedOneHotCategorical",
    "RelaxedOneHotCategoricalStraightThrough",
    "ScoreParts",
    "SkewLogistic",
    "SoftAsymmetricLaplace",
    "SoftLaplace",
    "StudentT",
    "TorchDistribution",
    "TorchDistributionMixin",
    "TransformModule",
    "TransformedDistribution",
    "Uniform",
    "Unit",
    "VonMises",
    "Weibull",
    "Wishart",
    "ZeroInflatedDistribution",
    "ZeroInflatedNegativeBinomial",
    "ZeroInflatedPoisson",
    "biject_to",
    "constraints",
    "enable_validation",
    "is_validation_enabled",
    "kl",
    "kl_divergence",
    "register_kl",
    "transform_to",
    "transforms",
    "util",
    "validation_enabled",
]
for _name in torch_families.__all__:
    if _name not in __all__:  # Known to this version of torch only.
        globals()[_name] = getattr(torch_families, _name)
        __all__ += [_name]

_ONLY_IN_PYRO = frozenset(
    {
        "AVFMultivariateNormal",
        "CoalescentRateLikelihood",
        "CoalescentTimes",
        "CoalescentTimesWithRate",
        "ConditionalDistribution",
        "ConditionalTransform",
        "ConditionalTransformModule",
        "ConditionalTransformedDistribution",
        "DiscreteHMM",
        "GammaGaussianHMM",
        "GaussianHMM",
        "GaussianMRF",
        "GaussianScaleMixture",
        "GroupedNormalNormal",
        "IndependentHMM",
        "LinearHMM",
        "LogNormalNegativeBinomial",
        "MixtureOfDiagNormals",
        "MixtureOfDiagNormalsSharedCovariance",
        "OMTMultivariateNormal",
        "OneOneMatching",
        "OneTwoMatching",
        "Rejector",
        "SineBivariateVonMises",
        "SineSkewed",
        "SpanningTree",
        "Stable",
        "StableWithLogProb",
        "TruncatedPolyaGamma",
        "VonMises3D",
    }
)


def __getattr__(name: str) -> Any:
    if name in _ONLY_IN_PYRO:
        raise AttributeError(
            f"fastsvi.distributions has no {name}. pyro.distributions.{name} can be used in a "
            "fastsvi model as it is, if pyro-ppl is installed"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
