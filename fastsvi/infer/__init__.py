"""Inference: losses, the fitting loop, guides made from models, and posterior predictions."""

from typing import TYPE_CHECKING, Any

from fastsvi.infer import autoguide
from fastsvi.infer.abstract_infer import EmpiricalMarginal, TracePosterior
from fastsvi.infer.convergence import Verdict
from fastsvi.infer.elbo import (
    ELBO,
    ELBOModule,
    JitTrace_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
    TraceMeanField_ELBO,
)
from fastsvi.infer.importance import Importance, psis_diagnostic, vectorized_importance_weights
from fastsvi.infer.predictive import Predictive
from fastsvi.infer.run_result import SVIRunResult, Timings
from fastsvi.infer.svi import SVI
from fastsvi.infer.util import enable_validation, is_validation_enabled

if TYPE_CHECKING:
    from fastsvi.infer.profiling import profile  # see below

__all__ = [
    "ELBO",
    "SVI",
    "ELBOModule",
    "EmpiricalMarginal",
    "Importance",
    "JitTraceMeanField_ELBO",
    "JitTrace_ELBO",
    "Predictive",
    "SVIRunResult",
    "Timings",
    "TraceMeanField_ELBO",
    "TracePosterior",
    "Trace_ELBO",
    "Verdict",
    "autoguide",
    "enable_validation",
    "is_validation_enabled",
    "profile",
    "psis_diagnostic",
    "vectorized_importance_weights",
]

# What Pyro has here and fastsvi has not, with the way to go.
_MISSING = {
    "TraceEnum_ELBO": "discrete sites are not summed out; sample them in a guide with Trace_ELBO, "
    "or sum them out in the model (a mixture as torch.logsumexp in a factor)",
    "TraceGraph_ELBO": "use Trace_ELBO, whose score-function terms know of plates",
    "RenyiELBO": "use Trace_ELBO",
    "ReweightedWakeSleep": "use Trace_ELBO",
    "MCMC": "fastsvi is variational; use a guide with SVI",
    "NUTS": "fastsvi is variational; use a guide with SVI",
    "HMC": "fastsvi is variational; use a guide with SVI",
    "config_enumerate": "discrete sites are not enumerated",
    "infer_discrete": "discrete sites are not enumerated",
}


class NotInFastSVIError(ImportError):
    """Something of Pyro's that fastsvi does not have."""


def __getattr__(name: str) -> Any:
    if name == "profile":  # seldom wanted, and a tenth of the time of the import
        from fastsvi.infer.profiling import profile

        return profile
    if name in _MISSING:
        raise NotInFastSVIError(f"fastsvi.infer has no {name}: {_MISSING[name]}.")
    raise AttributeError(f"module 'fastsvi.infer' has no attribute {name!r}")
