"""Optimizer state as tensors and JSON, for files without pickle.

A state is a tree of dicts, lists, tuples, numbers, strings and tensors. Tensors are cut out and
replaced by the name under which they are stored; what JSON cannot tell apart from a list or a
string-keyed dict is tagged.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastsvi.errors import CheckpointError

_PLAIN = (bool, int, float, str, type(None))


def encode(tree: Any, where: str = "optimizer") -> tuple[Any, dict[str, Tensor]]:
    """Split ``tree`` into plain data and named tensors.

    Raises:
        CheckpointError: something in it is neither plain data nor a tensor.

    >>> encode({"x": {"betas": (0.9, 0.999), "m": torch.zeros(2)}})[0]
    {'x': {'betas': {'(': [0.9, 0.999]}, 'm': {'#': 'optimizer/x/m'}}}
    """
    tensors: dict[str, Tensor] = {}

    def split(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value
            return {"#": path}
        if type(value) in _PLAIN:
            return value
        if isinstance(value, Counter):  # MultiStepLR's milestones
            return {"counter": [[split(k, path), n] for k, n in value.items()]}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) and key not in _TAGS for key in value):
                return {key: split(item, f"{path}/{key}") for key, item in value.items()}
            pairs = [[split(k, path), split(v, f"{path}/{k}")] for k, v in value.items()]
            return {"{": pairs}
        if isinstance(value, tuple):
            return {"(": [split(item, f"{path}/{i}") for i, item in enumerate(value)]}
        if isinstance(value, list | deque):
            return [split(item, f"{path}/{i}") for i, item in enumerate(value)]
        raise CheckpointError(
            f"cannot save optimizer state '{path}': it is a {type(value).__name__}, which is "
            "neither a number, a string nor a tensor; schedulers made from a function must be "
            "made anew, not loaded"
        )

    return split(tree, where), tensors


def decode(data: Any, tensors: Mapping[str, Tensor], path: str) -> Any:
    """Put together what :func:`encode` split; ``path`` of the file is for messages.

    >>> decode(*encode({"x": (1, torch.ones(1))}), "a file")
    {'x': (1, tensor([1.]))}
    """

    def join(value: Any) -> Any:
        if isinstance(value, list):
            return [join(item) for item in value]
        if not isinstance(value, dict):
            return value
        tag = next(iter(value), None) if len(value) == 1 else None
        if tag not in _TAGS:
            return {key: join(item) for key, item in value.items()}
        content = value[tag]
        try:
            if tag == "#":
                return tensors[content]
            if tag == "(":
                return tuple(join(item) for item in content)
            if tag == "{":
                return {join(key): join(item) for key, item in content}
            return Counter({join(key): int(count) for key, count in content})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"cannot read optimizer state from {path!r}: entry {tag!r} is malformed ({error}); "
                "the file is damaged, use another copy"
            ) from error

    return join(data)


_TAGS = ("#", "(", "{", "counter")


def move(tree: Any, map_location: Any) -> Any:
    """``tree`` with its tensors on another device, as ``torch.load`` maps them."""
    if map_location is None:
        return tree
    if isinstance(tree, Tensor):
        return _mapped(tree, map_location)
    if isinstance(tree, dict):
        return type(tree)({key: move(value, map_location) for key, value in tree.items()})
    if isinstance(tree, list | tuple):
        return type(tree)(move(value, map_location) for value in tree)
    return tree


def _mapped(tensor: Tensor, map_location: Any) -> Tensor:
    if isinstance(map_location, dict):
        return tensor.to(map_location.get(str(tensor.device), tensor.device))
    if isinstance(map_location, str | torch.device):
        return tensor.to(map_location)
    moved = map_location(tensor, str(tensor.device))
    return tensor if moved is None else moved
