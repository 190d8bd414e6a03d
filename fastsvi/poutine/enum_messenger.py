"""Parallel enumeration: ``poutine.enum``."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributions import Distribution

from fastsvi.errors import ShapeError
from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger
from fastsvi.poutine.runtime import _ENUM_ALLOCATOR

_Dims = dict[int, int]  # enumerated dim -> id of the site that it enumerates


class EnumMessenger(Messenger):
    """Gives discrete sites marked ``infer={"enumerate": "parallel"}`` all values of their support.

    The values lie along a new dim to the left of all plates, ``first_available_dim`` (negative) or
    further left. ``infer={"num_samples": n, "expand": True}`` makes them n draws.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> def model():
    ...     p = torch.tensor(0.3)
    ...     return pyro.sample("x", dist.Bernoulli(p), infer={"enumerate": "parallel"})
    >>> pyro.poutine.enum(model, first_available_dim=-2)()
    tensor([[0.],
            [1.]])
    """

    def __init__(self, first_available_dim: int | None = None) -> None:
        super().__init__()
        self.first_available_dim = first_available_dim
        self._markov_depths: dict[str, int] = {}
        self._param_dims: dict[str, _Dims] = {}  # dims that a site's parameters may depend on
        self._value_dims: dict[str, _Dims] = {}  # dims that a site's value has

    def __enter__(self) -> Any:
        if self.first_available_dim is not None:
            _ENUM_ALLOCATOR.set_first_available_dim(self.first_available_dim)
        self._markov_depths = {}
        self._param_dims = {}
        self._value_dims = {}
        return super().__enter__()

    def _pyro_sample(self, msg: Message) -> None:
        if msg.done or not isinstance(msg.fn, Distribution):
            return
        name = msg.name
        scope = msg.infer.get("_markov_scope")
        dims = dict(_ENUM_ALLOCATOR.dim_to_id)
        if scope is not None:
            for earlier, depth in scope.items():
                # A site whose count of contexts has changed has gone out of scope.
                if self._markov_depths[earlier] == depth:
                    dims.update(self._value_dims[earlier])
            self._markov_depths[name] = msg.infer["_markov_depth"]
        self._param_dims[name] = dims
        if msg.is_observed or msg.infer.get("enumerate") != "parallel":
            return
        target_dim, id_ = _ENUM_ALLOCATOR.allocate(None if scope is None else set(dims))
        value = _move_leftmost_dim(msg, _enumerated(msg), target_dim)
        value_dims = {dim: dims[dim] for dim in _wide_dims(msg.fn, value) if dim in dims}
        value_dims[target_dim] = id_
        msg.infer["_enumerate_dim"] = target_dim
        msg.infer["_dim_to_id"] = value_dims
        msg.value = value
        msg.done = True

    def _pyro_post_sample(self, msg: Message) -> None:
        if not isinstance(msg.fn, Distribution) or not isinstance(msg.value, torch.Tensor):
            return
        name = msg.name
        dim_to_id: _Dims = msg.infer.setdefault("_dim_to_id", {})
        dim_to_id.update(self._param_dims.get(name, {}))
        self._value_dims[name] = {
            dim: dim_to_id[dim] for dim in _wide_dims(msg.fn, msg.value) if dim in dim_to_id
        }


def _enumerated(msg: Message) -> torch.Tensor:
    """Values of the site along a new leftmost dim: [n, *batch, *event]."""
    num_samples, expand = msg.infer.get("num_samples"), msg.infer.get("expand", False)
    if num_samples is None:
        return msg.fn.enumerate_support(expand=expand)
    if num_samples > 1 and expand:
        return msg.fn(sample_shape=torch.Size([num_samples]))
    raise NotImplementedError(
        f"site {msg.name!r}: Tensor Monte Carlo (num_samples={num_samples}, expand={expand}) is "
        "not implemented; leave num_samples out to enumerate the support, or set expand=True"
    )


def _move_leftmost_dim(msg: Message, value: torch.Tensor, target_dim: int) -> torch.Tensor:
    """Move the enumerated dim, left of the batch shape now, to batch dim ``target_dim``."""
    event_dim = len(msg.fn.event_shape)
    actual_dim = -1 - len(msg.fn.batch_shape)
    if actual_dim < target_dim:
        if value.shape[target_dim - event_dim] != 1:
            raise ShapeError(
                f"site {msg.name!r} is to be enumerated along dim {target_dim}, where its batch "
                f"shape {tuple(msg.fn.batch_shape)} is not 1; raise the history of markov or "
                "max_plate_nesting"
            )
        value = value.transpose(target_dim - event_dim, actual_dim - event_dim)
        while value.dim() and value.shape[0] == 1:
            value = value.squeeze(0)
        return value
    ones = (1,) * (actual_dim - target_dim)
    return value.reshape(value.shape[:1] + ones + value.shape[1:])


def _wide_dims(fn: Any, value: torch.Tensor) -> list[int]:
    """Batch dims of ``value`` with more than one entry."""
    batch_dim = value.dim() - len(fn.event_shape)
    return [dim - batch_dim for dim in range(batch_dim) if value.shape[dim] > 1]
