"""A step of many independent fits in one launch: a thread block for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsvi.engine.cuda import driver
from fastsvi.engine.cuda.block_step import BlockStep
from fastsvi.engine.graph_loop import to_device
from fastsvi.errors import CaptureError


class BlockFits:
    """Runs one compiled step for ``F`` fits at once, in a single launch.

    The twin of :class:`~fastsvi.engine.native_fits.NativeFits`.

    Args:
        step: of one fit.
        state: ``[F, *shape]`` each, contiguous and on the device; overwritten.
        inputs: as those of the step, or with the fits in front where ``is_own`` says so.
        is_own: for each input whether every fit has its own.
        is_stepped: for each input whether it has an axis of steps before all others, of which each
            step reads the row of its number; by default none has.

    Raises:
        CaptureError: a tensor does not have the shape, dtype or place that the step needs.
    """

    def __init__(
        self,
        step: BlockStep,
        state: Sequence[Tensor],
        inputs: Sequence[Tensor],
        is_own: Sequence[bool],
        is_stepped: Sequence[bool] = (),
    ) -> None:
        self._step = step
        self._kept = [*state, *step.placed(inputs)]  # the table below holds their addresses only
        self._num_fits = len(state[0])
        all_own = [*[True] * len(state), *is_own]
        all_stepped = [*[False] * len(state), *(is_stepped or [False] * len(inputs))]
        columns, advances = [], []
        fits = torch.arange(self._num_fits, device="cpu")
        pairs = zip(self._kept, all_own, all_stepped, step.form, strict=True)
        for tensor, own, stepped, (shape, dtype) in pairs:
            axes = 1 if stepped else 0
            front = (*tensor.shape[:axes], *([self._num_fits] if own else []))
            if tuple(tensor.shape) != (*front, *shape) or tensor.dtype != dtype:
                raise CaptureError(
                    f"a step of {self._num_fits} fits needs a tensor of shape {(*front, *shape)}, "
                    f"{dtype}, found {tuple(tensor.shape)}, {tensor.dtype}"
                )
            if tensor.device != step.device or not tensor.is_contiguous():
                raise CaptureError(
                    f"the tensors of fits must be contiguous and on {step.device}, found strides "
                    f"{tensor.stride()} on {tensor.device}"
                )
            stride = tensor.stride(axes) * tensor.element_size() if own else 0
            columns.append(tensor.data_ptr() + fits * stride)
            advances.append(tensor.stride(0) * tensor.element_size() if stepped else 0)
        self._host = torch.stack(columns, 1)
        self._advances = driver.numbers(advances, step.device)
        self._fits: Tensor | None = None  # that the table on the device is of; None: all
        self._table = to_device(self._host, step.device)

    def run(self, num_steps: int, fits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take steps with all fits, or with some; without waiting for them.

        Args:
            num_steps: how many.
            fits: numbers of the fits, int64 ``[n]`` on the host.

        Returns:
            Losses ``[n, steps]``, and which steps were left out, bool ``[n, steps]``.
        """
        is_same = fits is self._fits or (
            fits is not None and self._fits is not None and torch.equal(fits, self._fits)
        )
        with torch.cuda.device_of(self._table):
            if not is_same:
                rows = self._host if fits is None else self._host[fits]
                self._fits, self._table = fits, to_device(rows, self._step.device)
            return self._step.launch(self._table, self._advances, num_steps)
