"""The lean core of the families that ordinary programs use most.

A torch family broadcasts its parameters when it is built. Here a family keeps them as they came:
a Python number stays a number, so ``Normal(0.0, 1.0)`` makes no tensor and its normaliser costs no
tensor operation; a scalar scale is not blown up to the shape of the data; ``expand`` only notes
the new shape. What users can read (``d.loc``) is broadcast when they read it. Shapes of samples
and densities are those of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsvi.distributions import validation
from fastsvi.distributions.torch_distribution import ExpandedDistribution
from fastsvi.distributions.util import SCALAR, Shape

__all__ = ["Elementwise", "derived", "parameter"]

Operand = Tensor | float
"""A parameter as the user gave it: not yet broadcast, possibly a Python number."""


class parameter:
    """A parameter of an elementwise family, read at the batch shape.

    The operand is kept in ``_<name>``; densities and samplers use that.
    """

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.slot = name, "_" + name

    def __get__(self, dist: Any, owner: type | None = None) -> Any:
        if dist is None:
            return self
        operand = getattr(dist, self.slot)
        shape = dist._batch_shape
        if isinstance(operand, Tensor) and operand.shape == shape:
            return operand
        cache = dist._cache
        if self.name not in cache:
            # Read first inside sample(), a view would lose its gradient for ever.
            with torch.enable_grad():
                if not isinstance(operand, Tensor):
                    operand = torch.tensor(operand, **dist._options())
                cache[self.name] = operand.expand(shape)
        return cache[self.name]

    def __set__(self, dist: Any, value: Any) -> None:
        vars(dist)[self.slot] = value
        dist._cache.pop(self.name, None)


class derived:
    """A property computed once per distribution, and again after ``expand``."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, dist: Any, owner: type | None = None) -> Any:
        if dist is None:
            return self
        cache = dist._cache
        if self.name not in cache:
            with torch.enable_grad():
                cache[self.name] = self.compute(dist)
        return cache[self.name]


class Elementwise:
    """Stands before torch's class in the bases; the family defines ``_params`` and ``log_prob``."""

    _params: tuple[str, ...]
    _batch_shape: torch.Size
    _validate_args: bool
    _event_shape = SCALAR
    _padded = False  # Whether the batch shape is wider than that of the operands.
    _family_init: ClassVar[Callable[..., None]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_params" in cls.__dict__:
            cls._family_init = cls.__init__

    def _bind(self, validate_args: bool | None, **operands: Any) -> None:
        """Take the arguments: keep them, find the batch shape, check them if asked to."""
        state = self.__dict__
        shape = SCALAR
        for name, operand in operands.items():
            if isinstance(operand, Tensor):
                own = operand.shape
                if own != shape and own:
                    shape = self._join(shape, own, operands) if shape else own
            elif not isinstance(operand, float):
                operand = validation.as_operand(type(self).__name__, name, operand)
                if isinstance(operand, Tensor):
                    shape = self._join(shape, operand.shape, operands)
            state["_" + name] = operand
        state["_batch_shape"] = shape
        if validate_args is not None:
            state["_validate_args"] = validate_args
        if self._validate_args:
            given = {name: state["_" + name] for name in operands}
            validation.check_arguments(type(self).__name__, given, self.arg_constraints)  # type: ignore[attr-defined]

    def _join(self, shape: torch.Size, other: torch.Size, operands: dict[str, Any]) -> torch.Size:
        try:
            return torch.broadcast_shapes(shape, other)
        except RuntimeError:
            raise validation.shapes_clash(type(self).__name__, operands) from None

    @property
    def _cache(self) -> dict[str, Any]:
        # Made on first use: most distributions are built, scored once and dropped.
        return self.__dict__.setdefault("_derived", {})

    def _options(self) -> dict[str, Any]:
        """Dtype and device of samples, and of operands that are numbers."""
        tensors = [x for x in map(self._operand, self._params) if isinstance(x, Tensor)]
        for tensor in tensors:
            if tensor.is_floating_point():
                return {"dtype": tensor.dtype, "device": tensor.device}
        device = tensors[0].device if tensors else None
        return {"dtype": torch.get_default_dtype(), "device": device}

    def _operand(self, name: str) -> Any:
        return getattr(self, "_" + name)

    def _size(self, sample_shape: Shape) -> torch.Size:
        if not isinstance(sample_shape, torch.Size):
            sample_shape = torch.Size(sample_shape)
        return sample_shape + self._batch_shape

    def _as_value(self, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return value
        options = self._options()
        prototype = torch.empty((), **options)
        return validation.as_value(type(self).__name__, value, prototype)

    def _prepare(self, value: Any) -> Tensor:
        """``value`` as a checked tensor against which the operands broadcast to the right shape."""
        if not isinstance(value, Tensor):
            value = self._as_value(value)
        elif not value.is_floating_point():
            # Mixed with numbers, integers would become float32 and lose half of float64's digits.
            value = value.to(self._options()["dtype"])
        if self._validate_args:
            self._validate_sample(value)  # type: ignore[attr-defined]
        if self._padded and value.shape != self._batch_shape:
            value = value.expand(torch.broadcast_shapes(value.shape, self._batch_shape))
        return value

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape; no tensor is touched."""
        family = type(self)
        if _instance is None:
            if family.__init__ is not family._family_init:
                # A subclass with its own constructor may hold more than the operands.
                return ExpandedDistribution(self, batch_shape)
            _instance = object.__new__(family)
        shape, old = torch.Size(batch_shape), self._batch_shape
        if shape[len(shape) - len(old) :] != old:
            self._require_expandable(old, shape)
        state = _instance.__dict__
        state.update(self.__dict__)
        state.pop("_derived", None)
        state["_batch_shape"] = shape
        if shape != old:
            state["_padded"] = True
        return _instance

    def _require_expandable(self, old: torch.Size, new: torch.Size) -> None:
        # torch.broadcast_shapes would do, at 15 us a call.
        pairs = zip(reversed(old), reversed(new), strict=False)
        if len(new) < len(old) or any(a != b and a != 1 for a, b in pairs):
            raise validation.BroadcastError(
                f"{type(self).__name__} of batch shape {tuple(old)} cannot be expanded to "
                f"{tuple(new)}: dimensions can be added on the left, and only those of size 1 "
                "stretched"
            )

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw without gradient, shape ``sample_shape + batch_shape``."""
        with torch.no_grad():
            return self.rsample(sample_shape)  # type: ignore[attr-defined]

    def cdf(self, value: Any) -> Tensor:
        """Probability of at most ``value``."""
        return super().cdf(self._as_value(value))  # type: ignore[misc]

    def icdf(self, value: Any) -> Tensor:
        """Value below which the probability is ``value``."""
        return super().icdf(self._as_value(value))  # type: ignore[misc]

    def __repr__(self) -> str:
        shown = []
        for name in self._params:
            operand = self._operand(name)
            if isinstance(operand, Tensor):
                operand = f"{operand}" if operand.numel() == 1 else tuple(operand.shape)
            shown.append(f"{name}: {operand}")
        if self._padded:
            shown.append(f"batch_shape: {tuple(self._batch_shape)}")
        return f"{type(self).__name__}({', '.join(shown)})"


def log(x: Operand) -> Any:
    """``log x`` of a number or tensor; of a number as torch has it, never a ``ValueError``."""
    if isinstance(x, Tensor):
        return x.log()
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def lgamma(x: Operand) -> Any:
    """``log Gamma(x)`` of a number or tensor."""
    if isinstance(x, Tensor):
        return x.lgamma()
    return math.lgamma(x) if x > 0 and x != math.inf else float(torch.tensor(x).lgamma())


def minus_log(x: Operand, constant: float) -> Any:
    """``constant - log x``."""
    return torch.rsub(x.log(), constant) if isinstance(x, Tensor) else constant - log(x)


def minus(a: Operand, b: Tensor) -> Tensor:
    """``a - b`` where only ``b`` is surely a tensor."""
    return a - b if isinstance(a, Tensor) else torch.rsub(b, a)


def minus_product(a: Operand, b: Tensor, c: Operand) -> Tensor:
    """``a - b * c`` in one operation."""
    if isinstance(a, Tensor):
        if isinstance(c, Tensor):
            return torch.addcmul(a, b, c, value=-1)
        return torch.sub(a, b, alpha=c)
    return torch.rsub(b * c, a) if isinstance(c, Tensor) else torch.rsub(b, a, alpha=c)


def half_inverse_square(scale: float) -> float:
    """``1 / (2 scale**2)`` of a number, infinite for 0 as a tensor's would be."""
    return 0.5 / scale**2 if scale else math.inf


def standardize(value: Tensor, loc: Operand, scale: Operand) -> Tensor:
    """``(value - loc) / scale`` without the operations that change nothing."""
    if isinstance(loc, Tensor) or loc != 0.0:
        value = value - loc
    if isinstance(scale, Tensor) or scale != 1.0:
        value = value / scale
    return value
