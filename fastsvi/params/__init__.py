"""The parameter store, over flat buffers that optimizers and kernels work on.

- :class:`ParamStore`: parameters by name, constrained and unconstrained.
- :class:`Buffer`, :class:`Companion`, :class:`Layout`, :class:`Segment`: the flat side of it.
- :mod:`fastsvi.params.checkpoint`: files of tensors with a JSON header.
- :class:`BoundDistribution`: a distribution over parameters, defined once.
"""

from fastsvi.params.bound import BoundDistribution
from fastsvi.params.buffer import Buffer
from fastsvi.params.companion import Companion
from fastsvi.params.layout import Layout, Segment
from fastsvi.params.names import (
    module_from_param_with_module_name,
    normalize_param_name,
    param_with_module_name,
    user_param_name,
)
from fastsvi.params.state_file import StateDict
from fastsvi.params.store import ParamStore, StoreStateError
from fastsvi.params.transforms import UnknownConstraintError

__all__ = [
    "BoundDistribution",
    "Buffer",
    "Companion",
    "Layout",
    "ParamStore",
    "Segment",
    "StateDict",
    "StoreStateError",
    "UnknownConstraintError",
    "module_from_param_with_module_name",
    "normalize_param_name",
    "param_with_module_name",
    "user_param_name",
]
