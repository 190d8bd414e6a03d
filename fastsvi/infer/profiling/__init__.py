"""Profiles of a step: where its time goes, and what would speed it up."""

from fastsvi.infer.profiling.advice import Advice
from fastsvi.infer.profiling.eager import EagerStep
from fastsvi.infer.profiling.native import NativeForm
from fastsvi.infer.profiling.profile import Profile, profile

__all__ = ["Advice", "EagerStep", "NativeForm", "Profile", "profile"]
