"""Where tensors from a file go: ``map_location`` as ``torch.load`` takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsvi.errors import CheckpointError
from fastsvi.params.checkpoint import refuse

MapLocation = Callable[[Any, str], Any] | torch.device | str | dict[str, str] | None


def relocate(tensor: Tensor, location: str, map_location: MapLocation, path: str) -> Tensor:
    """``tensor``, which lies on the CPU and was saved from ``location``, where it should go.

    ``map_location`` is a device for everything, a dict from saved to new device, or a function of
    (storage, saved location) that returns a storage, or None for no opinion; by default everything
    goes back to where it was.

    Raises:
        CheckpointError: the device does not exist here.
    """
    target: Any = location
    if isinstance(map_location, dict):
        target = map_location.get(location, location)
    elif isinstance(map_location, (str, torch.device)):
        target = map_location
    elif map_location is not None:
        storage = map_location(tensor.untyped_storage(), location)
        if storage is not None:
            empty = torch.empty(0, dtype=tensor.dtype, device=storage.device)
            untyped: Any = getattr(storage, "_untyped_storage", storage)
            return empty.set_(untyped, tensor.storage_offset(), tensor.size(), tensor.stride())
    try:
        return tensor.to(target)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch's, for want of a device
        raise unavailable(path, location, target) from error


def unavailable(path: str, location: str, target: Any) -> CheckpointError:
    """The error for a device that is not there."""
    return refuse(
        path,
        f"it holds tensors of device {location[:50]!r}, and {str(target)[:50]!r} is not available",
        'load it with map_location="cpu"',
    )
