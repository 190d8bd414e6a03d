"""Values of tensors that Python reads by no operation, while a function is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

# Each hands out numbers, or the memory that they lie in, without an operation that could be seen.
_READS = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__}


class Reads(TorchFunctionMode):
    """Has ``refuse(tensor, name)`` called before a tensor is read in such a way.

    >>> import torch
    >>> def refuse(tensor, name):
    ...     print("read by", name)
    >>> with Reads(refuse):
    ...     print(torch.arange(2).tolist())
    read by tolist
    [0, 1]
    """

    def __init__(self, refuse: Callable[[Tensor, str], None]) -> None:
        super().__init__()
        self._refuse = refuse

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _READS and args and isinstance(args[0], Tensor):
            self._refuse(args[0], func.__name__)
        return func(*args, **(kwargs or {}))
