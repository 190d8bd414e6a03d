"""Attributes by dotted path, on modules."""

from __future__ import annotations

from typing import Any

from fastsvi.errors import SiteError
from fastsvi.nn import PyroModule


def deep_setattr(module: PyroModule, path: str, value: Any) -> None:
    """Set attribute ``a.b.c`` of ``module``, making empty modules ``a`` and ``a.b`` on the way.

    Raises:
        SiteError: one of the prefixes already names a parameter.
    """
    *parents, name = path.split(".")
    for depth, parent in enumerate(parents, start=1):
        if parent not in module._modules:
            if parent in module._pyro_params or parent in module._parameters:
                raise SiteError(
                    f"site {path!r} lies below site {'.'.join(parents[:depth])!r}; an automatic "
                    f"guide names its parameters after sites, and these two names collide. "
                    f"Rename one of them, for example by replacing a dot with an underscore."
                )
            setattr(module, parent, PyroModule())
        module = module._modules[parent]  # type: ignore[assignment]
    if name in module._modules:
        raise SiteError(
            f"site {path!r} has other sites below it ({path}.*); an automatic guide names its "
            f"parameters after sites, and these names collide. Rename one of them."
        )
    setattr(module, name, value)


def deep_getattr(module: PyroModule, path: str) -> Any:
    """Read the parameter ``a.b.c`` of ``module``.

    A site may be called like a method of ``nn.Module`` (``type``, ``float``), which an ordinary
    attribute access would find first.
    """
    *parents, name = path.split(".")
    for parent in parents:
        module = module._modules[parent]  # type: ignore[assignment]
    return PyroModule.__getattr__(module, name)
