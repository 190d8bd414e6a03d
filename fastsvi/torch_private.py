"""The one place that touches private parts of torch, each with a public fallback.

torch offers no public way to ask whether a tensor is being vmapped; error messages and the
parameter store must know, because reading such a tensor's values is impossible.
"""

from __future__ import annotations

import torch

_functorch = getattr(torch._C, "_functorch", None)


def is_batched(tensor: torch.Tensor) -> bool:
    """True inside :func:`torch.func.vmap` for a tensor that carries the mapped axis."""
    if _functorch is not None and hasattr(_functorch, "is_batchedtensor"):
        return bool(_functorch.is_batchedtensor(tensor))
    return "BatchedTensor" in repr(tensor)
