"""Estimators of the evidence lower bound."""

from fastsvi.infer.elbo.base import ELBO, ELBOModule
from fastsvi.infer.elbo.mean_field import JitTraceMeanField_ELBO, TraceMeanField_ELBO
from fastsvi.infer.elbo.trace_elbo import JitTrace_ELBO, Trace_ELBO

__all__ = [
    "ELBO",
    "ELBOModule",
    "JitTraceMeanField_ELBO",
    "JitTrace_ELBO",
    "TraceMeanField_ELBO",
    "Trace_ELBO",
]
