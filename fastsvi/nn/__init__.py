"""Modules whose parameters and random attributes take part in inference.

:class:`PyroModule` and its attribute declarations have the semantics of ``pyro.nn``;
:mod:`fastsvi.nn.module` holds the rest of that surface (``to_pyro_module_``, ``clear``).
"""

from fastsvi.nn import module
from fastsvi.nn.auto_reg_nn import AutoRegressiveNN, ConditionalAutoRegressiveNN, MaskedLinear
from fastsvi.nn.dense_nn import ConditionalDenseNN, DenseNN
from fastsvi.nn.module import PyroModule, PyroModuleList, PyroParam, PyroSample, pyro_method

__all__ = [
    "AutoRegressiveNN",
    "ConditionalAutoRegressiveNN",
    "ConditionalDenseNN",
    "DenseNN",
    "MaskedLinear",
    "PyroModule",
    "PyroModuleList",
    "PyroParam",
    "PyroSample",
    "module",
    "pyro_method",
]
