"""Optimizers for parameters that appear while a program runs.

:class:`PyroOptim` wraps any torch optimizer; every optimizer and scheduler of torch is here under
its own name, taking ``(optim_args, clip_args=None)``. Adam, AdamW and ClippedAdam are fused over
the param store's flat buffers.
"""

from typing import TYPE_CHECKING, Any

from fastsvi.optim import adagrad_rmsprop, clipped_adam, dct_adam, lr_scheduler, pytorch_optimizers
from fastsvi.optim.lr_scheduler import PyroLRScheduler
from fastsvi.optim.optim import AdagradRMSProp, ClippedAdam, DCTAdam, PyroOptim
from fastsvi.optim.options import OptionError
from fastsvi.optim.pytorch_optimizers import *  # noqa: F403
from fastsvi.optim.pytorch_optimizers import __all__ as _from_torch

__all__ = [
    "AdagradRMSProp",
    "ClippedAdam",
    "DCTAdam",
    "OptionError",
    "PyroLRScheduler",
    "PyroOptim",
    "adagrad_rmsprop",
    "clipped_adam",
    "dct_adam",
    "lr_scheduler",
    "pytorch_optimizers",
]
__all__ += _from_torch

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """The names that follow the installed torch."""
