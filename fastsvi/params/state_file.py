"""A store's state as a section of a checkpoint: flat tensors, and what lies where in them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.distributions import constraints as tc
from torch.distributions.constraints import Constraint

from fastsvi.errors import CheckpointError
from fastsvi.params import checkpoint, pyro_file
from fastsvi.params.checkpoint import PathLike, refuse
from fastsvi.params.constraint_names import UnnamedConstraintError, from_data, to_data
from fastsvi.params.relocation import MapLocation, relocate
from fastsvi.params.transforms import UnknownConstraintError, coding_of

SECTION = "params"


class StateDict(TypedDict):
    """What :meth:`ParamStore.get_state` returns: unconstrained leaves and constraints, by name."""

    params: dict[str, Tensor]
    constraints: dict[str, Constraint]


def save_state(path: PathLike, state: StateDict, format: Literal["fastsvi", "pyro"]) -> None:
    """Write a state atomically; see :meth:`ParamStore.save`."""
    if format == "fastsvi":
        tensors, section = encode(state, os.fspath(path))
        checkpoint.write(path, tensors, {SECTION: section})
    elif format == "pyro":
        pyro_file.write(path, state["params"], state["constraints"])
    else:
        raise CheckpointError(f"unknown format {format!r}; the known ones are 'fastsvi' and 'pyro'")


def load_state(path: PathLike, map_location: MapLocation = None) -> StateDict:
    """Read a state from a file of either format; see :meth:`ParamStore.load`."""
    name = os.fspath(path)
    with open(path, "rb") as file:
        data = file.read()
    if pyro_file.looks_like_one(data):
        params, constraints = pyro_file.parse(data, name, map_location)
    else:
        tensors, header = checkpoint.parse(data, name)
        if not isinstance(header, dict) or SECTION not in header:
            raise refuse(name, "it holds no parameters", "save it with ParamStore.save")
        params, constraints = decode(tensors, header[SECTION], name, map_location)
    for param, constraint in constraints.items():
        try:
            coding_of(constraint, param)
        except UnknownConstraintError as error:
            raise refuse(name, str(error), "use another copy") from error
    return {"params": params, "constraints": constraints}


def encode(state: StateDict, path: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Tensors, one for each device and dtype, and one record for each parameter.

    Raises:
        CheckpointError: a constraint has no name in a file.
    """
    groups: dict[str, list[Tensor]] = {}
    records: list[dict[str, Any]] = []
    first_names: dict[int, str] = {}
    for name, leaf in state["params"].items():
        if not isinstance(name, str):
            raise CheckpointError(f"cannot save to {path!r}: the param name {name!r} is no string")
        constraint = state["constraints"].get(name, tc.real)
        try:
            record: dict[str, Any] = {"name": name, "constraint": to_data(constraint)}
        except UnnamedConstraintError as error:
            raise CheckpointError(
                f"cannot save param {name!r} to {path!r}: {error}. Save the state of the other "
                "params, or give this one a constraint that is listed"
            ) from error
        if id(leaf) in first_names:
            record["same_as"] = first_names[id(leaf)]
        else:
            first_names[id(leaf)] = name
            group = f"{SECTION}/{leaf.device}/{str(leaf.dtype).removeprefix('torch.')}"
            groups.setdefault(group, []).append(leaf.detach().reshape(-1))
            record["tensor"] = group
            record["shape"] = list(leaf.shape)
            record["requires_grad"] = leaf.requires_grad
            record["is_parameter"] = isinstance(leaf, nn.Parameter)
        records.append(record)
    return {group: torch.cat(pieces) for group, pieces in groups.items()}, records


def decode(
    tensors: Mapping[str, Tensor], section: Any, path: str, map_location: MapLocation = None
) -> tuple[dict[str, Tensor], dict[str, Constraint]]:
    """The leaves and constraints that :func:`encode` wrote, each leaf with memory of its own.

    Raises:
        CheckpointError: section and tensors do not fit together.
    """
    if not isinstance(section, list):
        raise refuse(path, "its list of params is malformed", _DAMAGED)
    cuts = {
        group: _Cut(group, tensor, path, map_location)
        for group, tensor in tensors.items()
        if group.startswith(f"{SECTION}/")
    }
    params: dict[str, Tensor] = {}
    constraints: dict[str, Constraint] = {}
    for record in section:
        name = record.get("name") if isinstance(record, dict) else None
        if not isinstance(name, str) or name in params:
            raise refuse(path, f"the record {str(record)[:200]} is malformed or double", _DAMAGED)
        try:
            constraints[name] = from_data(record.get("constraint"))
        except UnnamedConstraintError as error:
            raise refuse(path, f"param {name!r}: {error}", "update fastsvi") from error
        if "same_as" in record:
            if not isinstance(record["same_as"], str) or record["same_as"] not in params:
                raise refuse(path, f"param {name!r} is the same as an unknown one", _DAMAGED)
            params[name] = params[record["same_as"]]
            continue
        cut = cuts.get(record["tensor"]) if isinstance(record.get("tensor"), str) else None
        flags = record.get("requires_grad"), record.get("is_parameter")
        if cut is None or not all(isinstance(flag, bool) for flag in flags):
            raise refuse(path, f"param {name!r} is malformed", _DAMAGED)
        params[name] = as_leaf(cut.next(name, record.get("shape")), *flags)
    for group, cut in cuts.items():
        if cut.left:
            raise refuse(path, f"{cut.left} entries of {group!r} belong to no param", _DAMAGED)
    return params, constraints


def as_leaf(value: Tensor, requires_grad: Any, is_parameter: Any) -> Tensor:
    """A leaf of the type that was saved."""
    differentiable = value.is_floating_point() or value.is_complex()
    if is_parameter:
        return nn.Parameter(value, requires_grad=bool(requires_grad) and differentiable)
    return value.requires_grad_(bool(requires_grad) and differentiable)


_DAMAGED = "it is damaged; use another copy"


class _Cut:
    """Hands a flat tensor out piece by piece."""

    def __init__(self, group: str, tensor: Tensor, path: str, map_location: MapLocation) -> None:
        parts = group.split("/")
        if tensor.dim() != 1 or len(parts) != 3:
            raise refuse(path, f"tensor {group[:100]!r} is not flat", _DAMAGED)
        self._path = path
        self._flat = relocate(tensor, parts[1], map_location, path)
        self._offset = 0
        self.left = tensor.numel()

    def next(self, name: str, shape: Any) -> Tensor:
        is_shape = isinstance(shape, list) and all(
            type(size) is int and 0 <= size <= 2**62 for size in shape
        )
        numel = _product(shape) if is_shape else -1
        if not 0 <= numel <= self.left:
            raise refuse(
                self._path,
                f"param {name!r} of shape {str(shape)[:100]} does not fit into the "
                f"{self.left} entries left",
                _DAMAGED,
            )
        piece = self._flat[self._offset : self._offset + numel]
        self._offset += numel
        self.left -= numel
        return piece.clone().view(shape)


def _product(sizes: list[int]) -> int:
    numel = 1
    for size in sizes:
        numel *= size
    return numel
