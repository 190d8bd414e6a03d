"""What identifies a fit, as plain data: so that a saved run is taken up by no other program."""

from __future__ import annotations

import json
from collections.abc import Container
from typing import TYPE_CHECKING, Any

from fastsvi.engine.noise import Seed
from fastsvi.errors import CheckpointError
from fastsvi.params.constraint_names import UnnamedConstraintError, to_data
from fastsvi.poutine.runtime import PARAM_STORE

if TYPE_CHECKING:
    from fastsvi.infer.svi import SVI

_MAX_NAMED = 8
# Compared even where only one of the two has it.
_ALWAYS = ("num_fits", "num_particles")


def of_fit(svi: SVI) -> dict[str, Any]:
    """Parameters, optimizer and loss of a fit whose program has run.

    Raises:
        CheckpointError: a parameter is not in the param store, so it has no name to be saved by.
    """
    params = {}
    for leaf in svi._targets.leaves:
        name = PARAM_STORE.param_name(leaf)
        if name is None:
            raise CheckpointError(
                f"the run cannot be saved: a parameter of shape {tuple(leaf.shape)} is not in the "
                "param store. Register it with param or module (and leave the setting "
                "module_local_params off)."
            )
        try:
            constraint = json.dumps(to_data(PARAM_STORE.constraint(name)))
        except UnnamedConstraintError:
            constraint = repr(PARAM_STORE.constraint(name))
        shape, dtype = tuple(leaf.shape), str(leaf.dtype).removeprefix("torch.")
        params[name] = f"shape {shape}, {dtype}, constraint {constraint}"
    data: dict[str, Any] = {"params": params, **_settings(svi)}
    return json.loads(json.dumps(data, default=repr))


def _settings(svi: SVI) -> dict[str, Any]:
    optim, elbo = svi.optim, svi.elbo
    constructor = optim.pt_optim_constructor
    settings: dict[str, Any] = {
        "the optimizer": getattr(constructor, "__name__", type(constructor).__name__),
        "the loss": type(elbo).__name__ if elbo is not None else "a function",
    }
    # Options that are a function of the name have no form that can be compared.
    for what, options in (("optimizer", optim.pt_optim_args), ("clipping", optim.pt_clip_args)):
        if isinstance(options, dict):
            settings[f"the options of the {what}"] = options
    if elbo is not None:
        settings["num_particles"] = elbo.num_particles
    if svi._fits is not None:
        settings["num_fits"] = svi._fits.num_fits
        settings["first_fit"] = svi._fits.first_fit
    return settings


def require_same(
    saved: dict[str, Any], present: dict[str, Any], path: str, late: Container[str] = ()
) -> None:
    """Raise an error that names what differs, if something does.

    Args:
        saved, present: what :func:`of_fit` gave, after the first step.
        path: of the file.
        late: names of parameters in the file, also of those that came after the first step.
    """
    differences = []
    theirs, ours = saved.get("params"), present["params"]
    theirs = theirs if isinstance(theirs, dict) else {}
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if name not in ours:
            differences.append(f"parameter {name!r} is in the file and not in the program")
        elif name not in theirs:
            if name not in late:
                differences.append(f"parameter {name!r} is in the program and not in the file")
        elif theirs[name] != ours[name]:
            differences.append(
                f"parameter {name!r} is {theirs[name]} in the file and {ours[name]} in the program"
            )
    comparable = set(_ALWAYS) | (present.keys() & saved.keys() - {"params"})
    for what in sorted(comparable):
        if present.get(what) != saved.get(what):
            found, wanted = saved.get(what), present.get(what)
            differences.append(f"{what} is {found!r} in the file and {wanted!r} in the program")
    if not differences:
        return
    more = len(differences) - _MAX_NAMED
    lines = [*differences[:_MAX_NAMED], *([f"... and {more} more"] if more > 0 else [])]
    raise CheckpointError(
        "\n    ".join([f"checkpoint {path!r} was saved by another program:", *lines])
        + "\nNothing was changed. Give another path; to start from these parameters, "
        f"fastsvi.get_param_store().load({path!r})."
    )


# ------------------------------------------------------------------------------------------- seed


def seed(svi: SVI) -> dict[str, Any] | None:
    """The seed of a fit, and whether it was given; None if nothing was drawn with it."""
    found = None if svi._program is None else svi._program.noise.seed
    if found is None or not found.is_current:
        return None
    return {"value": found.value, "given": found.is_given}


def is_seed(data: Any) -> bool:
    """Whether ``data`` is what :func:`seed` gave."""
    return (
        isinstance(data, dict)
        and type(data.get("value")) is int
        and isinstance(data.get("given"), bool)
    )


def adopt_seed(svi: SVI, saved: dict[str, Any] | None, path: str) -> None:
    """Let the noise be that of the saved seed.

    Raises:
        CheckpointError: the fit was given another one.
    """
    if svi._program is None or saved is None:
        return
    own = svi._program.noise.seed
    if own.is_given and own.value != saved["value"]:
        raise CheckpointError(
            f"checkpoint {path!r} was saved by a fit with the seed {saved['value']}, and this one "
            f"has {own.value}: SVI(..., seed={saved['value']}) takes it up."
        )
    if own.is_current and own.value == saved["value"]:
        return
    value = saved["value"]
    svi._program.set_seed(value if saved["given"] else Seed.as_drawn(value))
