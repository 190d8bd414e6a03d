"""Making PyroModules out of ordinary modules, and emptying them."""

from __future__ import annotations

from typing import Any

import torch

from fastsvi.errors import DtypeError, describe
from fastsvi.nn.pyro_module import PyroModule, initialise


def to_pyro_module_(m: torch.nn.Module, recurse: bool = True) -> None:
    """Turn the module ``m`` into a :class:`~fastsvi.nn.PyroModule` in place.

    Its class changes from ``C`` to ``PyroModule[C]``; parameters keep their identity. Third-party
    networks become Bayesian this way without a change to their code.

    Args:
        m: the module.
        recurse: convert submodules too.

    Raises:
        DtypeError: ``m`` is not an ``nn.Module``.

    >>> import fastsvi.distributions as dist
    >>> from fastsvi.nn import PyroSample
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh())
    >>> to_pyro_module_(net)
    >>> for layer in net.modules():
    ...     for name, value in list(layer.named_parameters(recurse=False)):
    ...         prior = dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())
    ...         setattr(layer, name, PyroSample(prior))
    >>> type(net).__name__, net(torch.zeros(2)).shape
    ('PyroSequential', torch.Size([3]))
    """
    if not isinstance(m, torch.nn.Module):
        raise DtypeError(f"to_pyro_module_ takes an nn.Module, found {describe(m)}")
    if isinstance(m, PyroModule):
        children = list(m._modules.items()) if recurse else []
    else:
        m.__class__ = PyroModule[type(m)]
        initialise(m)
        for name, parameter in list(m._parameters.items()):
            setattr(m, name, parameter)
        children = list(m._modules.items())
    for name, child in children:
        if child is not None and recurse:
            to_pyro_module_(child)
        setattr(m, name, child)


def clear(mod: PyroModule) -> None:
    """Remove all parameters and submodules from ``mod``, and its parameters from the store.

    Call it before a module is replaced by another of the same name, which would otherwise
    continue with the values in the param store.

    Raises:
        DtypeError: ``mod`` is not a PyroModule.
    """
    if not isinstance(mod, PyroModule):
        raise DtypeError(f"clear takes a PyroModule, found {describe(mod)}")
    for kind in (mod._pyro_params, mod._parameters, mod._modules):
        for name in list(kind):
            delattr(mod, name)


class PyroModuleList(torch.nn.ModuleList, PyroModule):
    """``nn.ModuleList`` of PyroModules; ``PyroModule[nn.ModuleList]`` is this class.

    A slice is an ordinary ``nn.ModuleList``: a PyroModuleList would rename the modules in it, and
    they are still attributes of this one.

    >>> blocks = PyroModuleList([PyroModule[torch.nn.Linear](2, 2) for _ in range(3)])
    >>> [block._pyro_name for block in blocks[1:]]
    ['1', '2']
    """

    def __init__(self, modules: Any = None) -> None:
        super().__init__(modules)

    def __getitem__(self, idx: Any) -> Any:
        if isinstance(idx, slice):
            return torch.nn.ModuleList(list(self._modules.values())[idx])
        return super().__getitem__(idx)


PyroModule._pyro_mixin_cache[torch.nn.ModuleList] = PyroModuleList


class _FlatWeights:
    """Collects an RNN's weights at every use; torch would keep the ones it saw first."""

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self
        return [getattr(module, name) for name in module._flat_weights_names]

    def __set__(self, module: Any, value: Any) -> None:
        pass


PyroModule[torch.nn.RNNBase]._flat_weights = _FlatWeights()  # type: ignore[attr-defined]
