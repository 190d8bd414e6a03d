"""A native step for many independent fits, each with own state and own inputs."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsvi.engine.loops import blas
from fastsvi.engine.loops.memory import ALIGNMENT
from fastsvi.engine.native import NativeStep
from fastsvi.errors import CaptureError


class NativeFits:
    """Runs one compiled step for ``F`` fits, one after the other, in a single call.

    Args:
        native: the step of one fit.
        state: ``[F, *shape]`` each, contiguous; overwritten.
        inputs: as those of the step, or with the fits in front where ``is_own`` says so.
        is_own: for each input whether every fit has its own.
        is_stepped: for each input whether it has an axis of steps before all others, of which each
            step reads the row of its number; by default none has.

    Raises:
        CaptureError: a tensor does not have the shape, dtype or place that the step needs.

    >>> def step(total, x):
    ...     return total + x, total.sum(), total.isnan().any()
    >>> native = NativeStep(step, [torch.zeros(2)], [torch.ones(2)])
    >>> totals = torch.zeros(3, 2)
    >>> fits = NativeFits(native, [totals], [torch.arange(6.0).view(3, 2)], [True])
    >>> losses = torch.empty(3, 2)
    >>> fits.run(torch.arange(3), losses)
    tensor([2, 2, 2])
    >>> losses
    tensor([[0., 1.],
            [0., 5.],
            [0., 9.]])
    """

    def __init__(
        self,
        native: NativeStep,
        state: Sequence[Tensor],
        inputs: Sequence[Tensor],
        is_own: Sequence[bool],
        is_stepped: Sequence[bool] = (),
    ) -> None:
        native.build()
        self._native = native
        self._kept = [*state, *inputs]  # the table below holds their addresses only
        num_fits = len(state[0])
        fits = torch.arange(num_fits)
        columns, advances = [], []
        all_own = [*[True] * len(state), *is_own]
        all_stepped = [*[False] * len(state), *(is_stepped or [False] * len(inputs))]
        pairs = zip([*state, *inputs], all_own, all_stepped, strict=True)
        for (tensor, own, stepped), (shape, dtype) in zip(pairs, native._form, strict=True):
            steps = tuple(tensor.shape[:1]) if stepped else ()
            expected = (*steps, num_fits, *shape) if own else (*steps, *shape)
            if tuple(tensor.shape) != expected or tensor.dtype != dtype:
                raise CaptureError(
                    f"a step of {num_fits} fits needs a tensor of shape {expected}, {dtype}, found "
                    f"{tuple(tensor.shape)}, {tensor.dtype}"
                )
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise CaptureError("the tensors of native fits must be contiguous and on the CPU")
            stride = tensor.stride(len(steps)) * tensor.element_size() if own else 0
            columns.append(tensor.data_ptr() + fits * stride)
            advances.append(tensor.stride(0) * tensor.element_size() if stepped else 0)
        self._table = torch.stack(columns, 1)  # addresses [F, n]
        self._advances = torch.tensor(advances)  # bytes from step to step
        self._strides = (ctypes.c_int64 * (len(advances) + 1))(*advances)

    def run(self, fits: Tensor, losses: Tensor, first: int = 0) -> Tensor:
        """Take ``losses.shape[1]`` steps with some fits; calls in several threads may overlap.

        Args:
            fits: numbers of the fits, int64 ``[n]``.
            losses: ``[n, steps]``, contiguous rows; overwritten.
            first: the row that the first of these steps reads of what has an axis of steps.

        Returns:
            How many steps each made, int64 ``[n]``, before one that said to halt.
        """
        native = self._native
        library, arenas = native._library, native._arenas
        if library is None:
            raise CaptureError("a native step was run before it was built")
        rows = self._table[fits] + first * self._advances
        done = torch.zeros(len(fits), dtype=torch.int64)
        try:
            arena = arenas.pop()
        except IndexError:
            arena = torch.empty(native.arena_bytes + ALIGNMENT, dtype=torch.uint8)
        library.run_many(
            len(fits),
            rows.data_ptr(),
            rows.shape[1],
            self._strides,
            native._constant_pointers,
            -(-arena.data_ptr() // ALIGNMENT) * ALIGNMENT,
            losses.data_ptr(),
            losses.stride(0) * losses.element_size(),
            losses.shape[1],
            ctypes.byref(ctypes.c_int(0)),
            blas.pointers(),
            done.data_ptr(),
        )
        arenas.append(arena)
        return done
