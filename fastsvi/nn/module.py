"""Everything about :class:`PyroModule` under the import path that Pyro programs use."""

from fastsvi.nn.attributes import PyroParam, PyroSample
from fastsvi.nn.convert import PyroModuleList, clear, to_pyro_module_
from fastsvi.nn.pyro_module import PyroModule, pyro_method

__all__ = [
    "PyroModule",
    "PyroModuleList",
    "PyroParam",
    "PyroSample",
    "clear",
    "pyro_method",
    "to_pyro_module_",
]
