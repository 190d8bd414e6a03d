"""Steps that are taken to be measured, and then taken back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsvi.infer.saved_run import go_to, where
from fastsvi.poutine.runtime import PARAM_STORE

if TYPE_CHECKING:
    from fastsvi.infer.svi import SVI


@contextlib.contextmanager
def unchanged(svi: SVI, args: Any, kwargs: Any) -> Iterator[SVI]:
    """A fit to take steps with; afterwards everything that steps change is as it was before.

    What a fit has not begun with, it must not find begun: a fit without any step is therefore stood
    for by a copy, in a param store of its own. Python state that the program itself changes, such
    as a counter, is not taken back.
    """
    program = svi._program
    if svi._targets.leaves or (program is not None and program.rehearsed):
        with _taken_back(svi):
            yield svi
        return
    generator = torch.get_rng_state()
    with PARAM_STORE.scope(PARAM_STORE.get_state()), _buffers_kept(svi):
        twin = _twin(svi)
        try:
            twin._accumulate(args, kwargs)  # makes the parameters
            twin._targets.zero_grad()
            with _taken_back(twin):
                yield twin
        finally:
            torch.set_rng_state(generator)


def _twin(svi: SVI) -> SVI:
    """A copy of a fit that has not begun; data and functions are shared."""
    model, guide = copy.deepcopy((svi.model, svi.guide))
    optim = copy.deepcopy(svi.optim)
    loss: Any = svi.loss if svi.elbo is None else copy.copy(svi.elbo)
    own = None if svi.elbo is not None else svi.loss_and_grads
    if own is not None and getattr(own, "__self__", None) is svi:
        own = None  # the default one
    program = svi._program
    seed = program.noise.seed if program is not None else None
    number = seed.value if seed is not None and seed.is_given else None
    return type(svi)(model, guide, optim, loss, own, seed=number)


@contextlib.contextmanager
def _taken_back(svi: SVI) -> Iterator[None]:
    leaves = {id(leaf): leaf for _, leaf in PARAM_STORE.named_parameters()}
    leaves |= {id(leaf): leaf for leaf in svi._targets.leaves}
    values = [(leaf, leaf.detach().clone()) for leaf in leaves.values()]
    grads = [(leaf, _copy(leaf.grad)) for leaf in leaves.values()]
    names = set(PARAM_STORE.keys())
    optimizer, point = svi.optim.get_state(), where(svi, 0)
    seed = {} if svi._program is None else vars(svi._program.noise.seed)
    drawn = dict(seed)
    try:
        with _buffers_kept(svi):
            yield
    finally:
        for name in [name for name in list(PARAM_STORE) if name not in names]:
            del PARAM_STORE[name]
        with torch.no_grad():
            for leaf, value in values:
                leaf.copy_(value)
            for leaf, kept in grads:
                if kept is None:
                    leaf.grad = None
                elif leaf.grad is not None:
                    leaf.grad.copy_(kept)
        svi.optim.set_state(optimizer)
        seed.update(drawn)
        go_to(svi, point)


@contextlib.contextmanager
def _buffers_kept(svi: SVI) -> Iterator[None]:
    """Buffers of modules, such as running means, are put back at the end."""
    modules = [x for x in (svi.model, svi.guide) if isinstance(x, torch.nn.Module)]
    buffers = [buffer for module in modules for buffer in module.buffers()]
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
