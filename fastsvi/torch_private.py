"""The one place that touches private parts of torch, each with a public fallback.

torch offers no public way to ask whether a tensor is being vmapped; error messages and the
parameter store must know, because reading such a tensor's values is impossible. Nor is there one to
have a tensor mapped in the middle of a mapped function, as noise is that was drawn for all
particles at once.
"""

from __future__ import annotations

import torch

_functorch = getattr(torch._C, "_functorch", None)


def is_batched(tensor: torch.Tensor) -> bool:
    """True inside :func:`torch.func.vmap` for a tensor that carries the mapped axis."""
    if _functorch is not None and hasattr(_functorch, "is_batchedtensor"):
        return bool(_functorch.is_batchedtensor(tensor))
    return "BatchedTensor" in repr(tensor)


def mapped_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``rows[index]`` inside a vmap over ``index``, which runs from 0 to ``len(rows) - 1``.

    >>> rows = torch.eye(2)
    >>> torch.func.vmap(lambda i: mapped_rows(rows, i) + i)(torch.arange(2))
    tensor([[1., 0.],
            [1., 2.]])
    """
    if _functorch is not None and hasattr(_functorch, "_add_batch_dim"):
        level = _functorch.maybe_get_level(index)
        if level >= 0:
            mapped: torch.Tensor = _functorch._add_batch_dim(rows, 0, level)
            return mapped
    return rows[index]  # right too, but an operation, which copies and stands in recorded graphs
