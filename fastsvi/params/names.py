"""Names of the parameters of a module, as Pyro writes them: ``module$$$submodule.weight``."""

from __future__ import annotations

MODULE_NAMESPACE_DIVIDER = "$$$"


def param_with_module_name(pyro_name: str, param_name: str) -> str:
    """Full name of parameter ``param_name`` of the module registered as ``pyro_name``.

    >>> param_with_module_name("encoder", "linear.weight")
    'encoder$$$linear.weight'
    """
    return f"{pyro_name}{MODULE_NAMESPACE_DIVIDER}{param_name}"


def module_from_param_with_module_name(param_name: str) -> str:
    """Name of the module in a full name; a name without a module is returned as it is.

    >>> module_from_param_with_module_name("encoder$$$linear.weight")
    'encoder'
    """
    return param_name.split(MODULE_NAMESPACE_DIVIDER)[0]


def user_param_name(param_name: str) -> str:
    """What stands after the module's name; a name without a module is returned as it is.

    >>> user_param_name("encoder$$$linear.weight")
    'linear.weight'
    """
    parts = param_name.split(MODULE_NAMESPACE_DIVIDER)
    return parts[1] if len(parts) > 1 else param_name


def normalize_param_name(name: str) -> str:
    """Full name with dots only, as ``nn.Module.named_parameters`` writes it.

    >>> normalize_param_name("encoder$$$linear.weight")
    'encoder.linear.weight'
    """
    return name.replace(MODULE_NAMESPACE_DIVIDER, ".")
