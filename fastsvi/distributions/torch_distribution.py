"""torch distributions with Pyro's methods, and the three ways to reshape any of them.

:class:`TorchDistribution` adds the methods; :class:`Independent` moves batch dimensions into the
event, :class:`ExpandedDistribution` adds batch dimensions, :class:`MaskedDistribution` silences
entries. They stand in one file because each method returns one of these classes.

MRO trap: a family derives from torch's class first and from :class:`TorchDistribution` second. In
that order torch's own ``expand`` and ``sample`` win where they exist, while the checks of
``torch.distributions.Distribution`` are still replaced by ours.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from fastsvi.distributions import validation
from fastsvi.distributions.distribution import Distribution
from fastsvi.distributions.score_parts import ScoreParts
from fastsvi.distributions.util import SCALAR, Shape, broadcast_shape, scale_and_mask, sum_rightmost
from fastsvi.distributions.values import prototype
from fastsvi.errors import ShapeError

__all__ = [
    "ExpandedDistribution",
    "Independent",
    "MaskedDistribution",
    "TorchDistribution",
    "TorchDistributionMixin",
]


class TorchDistributionMixin:
    """Pyro's methods for a class that also derives from a torch distribution.

    Prefer :class:`TorchDistribution` as a base. The mixin alone suits a class that lists a torch
    family before it: ``class MyNormal(torch.distributions.Normal, TorchDistributionMixin)``.
    """

    def __call__(self, sample_shape: Shape = SCALAR) -> Tensor:
        """Draw a value of shape ``self.shape(sample_shape)``: by ``rsample`` where there is one."""
        if self.has_rsample:  # type: ignore[attr-defined]
            return self.rsample(sample_shape)  # type: ignore[attr-defined]
        return self.sample(sample_shape)  # type: ignore[attr-defined]

    @property
    def event_dim(self) -> int:
        """Number of dimensions of one event."""
        return len(self.event_shape)  # type: ignore[attr-defined]

    def shape(self, sample_shape: Shape = SCALAR) -> torch.Size:
        """Shape of ``sample(sample_shape)``: sample shape, batch shape, event shape."""
        return torch.Size(sample_shape) + self.batch_shape + self.event_shape  # type: ignore[attr-defined]

    @classmethod
    def infer_shapes(cls, **arg_shapes: Shape) -> tuple[torch.Size, torch.Size]:
        """``(batch_shape, event_shape)`` that arguments of the given shapes would lead to.

        >>> import fastsvi.distributions as dist
        >>> dist.Normal.infer_shapes(loc=(3, 1), scale=(4,))
        (torch.Size([3, 4]), torch.Size([]))
        """
        if cls.support.event_dim > 0:  # type: ignore[attr-defined]
            raise NotImplementedError(f"{cls.__name__} does not implement infer_shapes()")
        batch_shapes = []
        for name, shape in arg_shapes.items():
            sizes = tuple(shape)
            constraint = cls.arg_constraints.get(name, constraints.real)  # type: ignore[attr-defined]
            batch_shapes.append(sizes[: len(sizes) - constraint.event_dim])
        return broadcast_shape(*batch_shapes), SCALAR

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution with its batch dimensions expanded to ``batch_shape``."""
        return ExpandedDistribution(self, batch_shape)

    def expand_by(self, sample_shape: Shape) -> Any:
        """Add ``sample_shape`` on the left of the batch shape.

        >>> import fastsvi.distributions as dist
        >>> dist.Normal(torch.zeros(3), 1.0).expand_by([2]).batch_shape
        torch.Size([2, 3])
        """
        batch_shape = torch.Size(sample_shape) + self.batch_shape  # type: ignore[attr-defined]
        try:
            return self.expand(batch_shape)
        except NotImplementedError:
            return ExpandedDistribution(self, batch_shape)

    def reshape(self, sample_shape: Any = None, extra_event_dims: Any = None) -> Any:
        """Removed from Pyro; raises with the replacement."""
        raise NotImplementedError(
            "reshape(sample_shape=s, extra_event_dims=n) does not exist; "
            "write expand_by(s).to_event(n)"
        )

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        """Move the ``n`` rightmost batch dimensions into the event (all of them by default).

        A negative ``n`` moves dimensions back that an earlier ``to_event`` moved.

        >>> import fastsvi.distributions as dist
        >>> d = dist.Normal(torch.zeros(2, 3, 4), 1.0).to_event(2)
        >>> d.batch_shape, d.event_shape
        (torch.Size([2]), torch.Size([3, 4]))
        >>> d.log_prob(d()).shape
        torch.Size([2])
        """
        base: Any = self
        ndims = reinterpreted_batch_ndims
        if ndims is None:
            ndims = len(base.batch_shape)
        while isinstance(base, torch.distributions.Independent):
            ndims += base.reinterpreted_batch_ndims
            base = base.base_dist
        if ndims == 0:
            return base
        if ndims < 0:
            raise ShapeError(
                f"to_event({reinterpreted_batch_ndims}) would remove event dimensions that "
                f"{type(self).__name__} has by nature; to_event(-n) only undoes to_event(n)"
            )
        return Independent(base, ndims)

    def independent(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        """Deprecated name of :meth:`to_event`."""
        warnings.warn("independent() is deprecated; use to_event()", DeprecationWarning, 2)
        return self.to_event(reinterpreted_batch_ndims)

    def mask(self, mask: Tensor | bool) -> MaskedDistribution:
        """Silence the entries where ``mask`` (a bool or boolean tensor) is false.

        ``log_prob`` is zero there; samples are unchanged. The mask broadcasts against the batch
        shape.

        >>> import fastsvi.distributions as dist
        >>> d = dist.Normal(torch.zeros(2), 1.0).mask(torch.tensor([True, False]))
        >>> d.log_prob(torch.zeros(2))
        tensor([-0.9189,  0.0000])
        """
        return MaskedDistribution(self, mask)

    def _get_checked_instance(self, cls: type, _instance: Any = None) -> Any:
        new = super()._get_checked_instance(cls, _instance)  # type: ignore[misc]
        # expand() copies the parameters only; has_rsample_(False) must survive it too.
        if "has_rsample" in vars(self):
            new.has_rsample = vars(self)["has_rsample"]
        return new

    def _validate_sample(self, value: Tensor) -> None:
        family = type(self).__name__
        try:
            support = self.support  # type: ignore[attr-defined]
        except NotImplementedError:
            warnings.warn(
                f"{family} defines no support, so values cannot be checked; define it on the "
                "class or pass validate_args=False",
                stacklevel=3,
            )
            support = None
        value = validation.as_value(family, value, prototype(self))
        validation.check_value(family, value, self.batch_shape, self.event_shape, support)  # type: ignore[attr-defined]


class TorchDistribution(TorchDistributionMixin, torch.distributions.Distribution, Distribution):
    """Base of distributions over tensors.

    Shapes follow torch: a value has shape ``sample_shape + batch_shape + event_shape`` and
    ``log_prob`` sums over the event, giving ``sample_shape + batch_shape``. A new family sets
    ``arg_constraints`` and ``support``, calls ``super().__init__(batch_shape, event_shape)`` and
    defines ``log_prob`` and ``sample`` (or ``rsample`` with ``has_rsample = True``). ``expand``
    works without being defined, through :class:`ExpandedDistribution`.

    >>> class Point(TorchDistribution):
    ...     arg_constraints, support, has_rsample = {}, constraints.real, True
    ...     def rsample(self, sample_shape=()):
    ...         return torch.zeros(self.shape(sample_shape))
    ...     def log_prob(self, value):
    ...         return (value == 0).log()
    >>> Point().expand([2, 3]).to_event(1)().shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        batch_shape: Shape = SCALAR,
        event_shape: Shape = SCALAR,
        validate_args: bool | None = None,
    ) -> None:
        self._batch_shape = torch.Size(batch_shape)
        self._event_shape = torch.Size(event_shape)
        if validate_args is not None:
            self._validate_args = validate_args
        if self._validate_args:
            arguments = validation.arguments_of(self)
            if arguments:
                validation.check_arguments(type(self).__name__, arguments, self.arg_constraints)
        # Past torch's __init__, which would check once more, to whatever a user mixes in.
        super(torch.distributions.Distribution, self).__init__()

    has_rsample = False
    has_enumerate_support = False
    expand = TorchDistributionMixin.expand


class HasRsampleOfBase:
    """``has_rsample`` of the wrapped distribution, unless it was set on the wrapper itself."""

    def __get__(self, wrapper: Any, owner: type | None = None) -> Any:
        if wrapper is None:
            return self
        chosen = vars(wrapper).get("has_rsample")
        return wrapper.base_dist.has_rsample if chosen is None else chosen

    def __set__(self, wrapper: Any, value: bool) -> None:
        vars(wrapper)["has_rsample"] = value


class Independent(torch.distributions.Independent, TorchDistribution):  # type: ignore[misc,override]
    """The ``n`` rightmost batch dimensions of a distribution, made event dimensions.

    Usually made by :meth:`~TorchDistributionMixin.to_event`.
    """

    has_rsample = HasRsampleOfBase()  # type: ignore[assignment]

    def __init__(
        self,
        base_distribution: Any,
        reinterpreted_batch_ndims: int,
        validate_args: bool | None = None,
    ) -> None:
        shape = base_distribution.batch_shape
        cut = len(shape) - reinterpreted_batch_ndims
        if not 0 <= cut <= len(shape):
            raise ShapeError(
                f"to_event({reinterpreted_batch_ndims}) on {type(base_distribution).__name__} of "
                f"batch shape {tuple(shape)}: there are {len(shape)} batch dimensions to move. "
                "Expand the distribution first, or pass a smaller number"
            )
        self.base_dist = base_distribution
        self.reinterpreted_batch_ndims = reinterpreted_batch_ndims
        self._batch_shape = shape[:cut]
        self._event_shape = shape[cut:] + base_distribution.event_shape
        if validate_args is not None:
            self._validate_args = validate_args

    @property
    def _validate_args(self) -> bool:  # type: ignore[override]
        return self.base_dist._validate_args

    @_validate_args.setter
    def _validate_args(self, value: bool) -> None:
        self.base_dist._validate_args = value

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> Any:
        """Not defined: the shapes depend on the wrapped distribution."""
        raise NotImplementedError("Independent does not implement infer_shapes()")

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """See :meth:`TorchDistributionMixin.expand`."""
        moved = self._event_shape[: self.reinterpreted_batch_ndims]
        base = self.base_dist.expand(torch.Size(batch_shape) + moved)
        new = self._get_checked_instance(Independent, _instance)
        Independent.__init__(new, base, self.reinterpreted_batch_ndims)
        return new

    def log_prob(self, value: Any) -> Tensor:
        """Log-density of events; shape ``sample_shape + batch_shape``."""
        return sum_rightmost(self.base_dist.log_prob(value), self.reinterpreted_batch_ndims)

    def entropy(self) -> Tensor:
        """Entropy of the events; shape ``batch_shape``."""
        return sum_rightmost(self.base_dist.entropy(), self.reinterpreted_batch_ndims)


class MaskedDistribution(TorchDistribution):
    """A distribution of which only the entries under a mask count.

    ``mask`` is a bool, or a boolean tensor that broadcasts against the batch shape. With
    ``mask=False`` nothing is computed at all: ``log_prob`` is a constant zero.
    """

    arg_constraints: ClassVar = {}
    has_rsample = HasRsampleOfBase()  # type: ignore[assignment]

    def __init__(self, base_dist: Any, mask: Tensor | bool) -> None:
        if not isinstance(mask, bool):
            batch_shape = broadcast_shape(mask.shape, base_dist.batch_shape)
            mask = mask.bool().expand(batch_shape)
            if base_dist.batch_shape != batch_shape:
                base_dist = base_dist.expand(batch_shape)
        self._mask = mask
        self.base_dist = base_dist
        super().__init__(base_dist.batch_shape, base_dist.event_shape)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """See :meth:`TorchDistributionMixin.expand`."""
        new = self._get_checked_instance(MaskedDistribution, _instance)
        batch_shape = torch.Size(batch_shape)
        mask = self._mask if isinstance(self._mask, bool) else self._mask.expand(batch_shape)
        MaskedDistribution.__init__(new, self.base_dist.expand(batch_shape), mask)
        return new

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether the wrapped distribution can enumerate its support."""
        return self.base_dist.has_enumerate_support

    @constraints.dependent_property
    def support(self) -> Any:
        """Support of the wrapped distribution."""
        return self.base_dist.support

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A draw of the wrapped distribution, masked entries included."""
        return self.base_dist.sample(sample_shape)

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """A reparameterized draw of the wrapped distribution, masked entries included."""
        return self.base_dist.rsample(sample_shape)

    def log_prob(self, value: Any) -> Tensor:
        """Log-density under the mask, zero elsewhere; shape ``sample_shape + batch_shape``."""
        if self._mask is not False:
            return scale_and_mask(self.base_dist.log_prob(value), mask=self._mask)
        value = validation.as_value(type(self).__name__, value, prototype(self))
        dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        shape = broadcast_shape(self.batch_shape, _batch_part(value, self.event_dim))
        return torch.zeros((), dtype=dtype, device=value.device).expand(shape)

    def score_parts(self, x: Any, *args: Any, **kwargs: Any) -> ScoreParts:
        """See :meth:`Distribution.score_parts`."""
        if isinstance(self._mask, bool):
            return super().score_parts(x)
        return _score_parts_of_base(self, x).scale_and_mask(mask=self._mask)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """See :meth:`Distribution.enumerate_support`."""
        return self.base_dist.enumerate_support(expand=expand)

    @property
    def mean(self) -> Tensor:
        """Mean of the wrapped distribution."""
        return self.base_dist.mean

    @property
    def variance(self) -> Tensor:
        """Variance of the wrapped distribution."""
        return self.base_dist.variance

    def __repr__(self) -> str:
        mask = self._mask if isinstance(self._mask, bool) else tuple(self._mask.shape)
        return f"{type(self).__name__}({self.base_dist!r}, mask={mask})"


class ExpandedDistribution(TorchDistribution):
    """Batch expansion of a distribution that does not know how to expand itself.

    The new entries are independent draws of the wrapped distribution. ``batch_shape`` may add
    dimensions on the left and stretch dimensions of size 1.
    """

    arg_constraints: ClassVar = {}
    has_rsample = HasRsampleOfBase()  # type: ignore[assignment]

    def __init__(self, base_dist: Any, batch_shape: Shape = SCALAR) -> None:
        batch_shape = torch.Size(batch_shape)
        base_shape = base_dist.batch_shape
        added = len(batch_shape) - len(base_shape)
        pairs = list(zip(base_shape, batch_shape[max(added, 0) :], strict=False))
        if added < 0 or any(old != new and old != 1 for old, new in pairs):
            raise ShapeError(
                f"{type(base_dist).__name__} of batch shape {tuple(base_shape)} cannot be expanded "
                f"to {tuple(batch_shape)}: dimensions can be added on the left, and only those of "
                "size 1 stretched"
            )
        self.base_dist = base_dist
        # Axes of size 1 that grow, counted from the right, and how many draws each needs.
        self._stretched = {
            axis - len(pairs): new for axis, (old, new) in enumerate(pairs) if old != new
        }
        self._added = batch_shape[:added]
        super().__init__(batch_shape, base_dist.event_shape)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """See :meth:`TorchDistributionMixin.expand`."""
        # Growing in two steps must not allow what one step forbids, hence the check against self.
        batch_shape = torch.Size(batch_shape)
        ExpandedDistribution(self, batch_shape)
        new = self._get_checked_instance(ExpandedDistribution, _instance)
        ExpandedDistribution.__init__(new, self.base_dist, batch_shape)
        return new

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether the wrapped distribution can enumerate its support."""
        return self.base_dist.has_enumerate_support

    @constraints.dependent_property
    def support(self) -> Any:
        """Support of the wrapped distribution."""
        return self.base_dist.support

    def _draw(self, draw: Callable[[torch.Size], Tensor], sample_shape: Shape) -> Tensor:
        # Draw the stretched axes as sample dimensions, then swap each with its axis of size 1.
        outer = torch.Size(sample_shape) + self._added
        x = draw(outer + torch.Size(self._stretched.values()))
        for i, axis in enumerate(self._stretched):
            x = x.transpose(len(outer) + i, axis - self.event_dim)
        return x.reshape(self.shape(sample_shape))

    def sample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """Independent draws for every entry of the batch."""
        return self._draw(self.base_dist.sample, sample_shape)

    def rsample(self, sample_shape: Shape = SCALAR) -> Tensor:
        """Independent reparameterized draws for every entry of the batch."""
        return self._draw(self.base_dist.rsample, sample_shape)

    def _widen(self, term: Any, value: Any) -> Any:
        if not isinstance(term, Tensor):
            return term
        outer = _batch_part(value, self.event_dim) if isinstance(value, Tensor) else SCALAR
        return term.expand(broadcast_shape(self.batch_shape, outer))

    def log_prob(self, value: Any) -> Tensor:
        """Log-density; shape ``sample_shape + batch_shape``."""
        return self._widen(self.base_dist.log_prob(value), value)

    def score_parts(self, x: Any, *args: Any, **kwargs: Any) -> ScoreParts:
        """See :meth:`Distribution.score_parts`."""
        return ScoreParts(*(self._widen(part, x) for part in _score_parts_of_base(self, x)))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """See :meth:`Distribution.enumerate_support`."""
        values = self.base_dist.enumerate_support(expand=False)
        ones = (1,) * len(self.batch_shape)
        values = values.reshape(values.shape[:1] + ones + self.event_shape)
        return values.expand(values.shape[:1] + self.shape()) if expand else values

    @property
    def mean(self) -> Tensor:
        """Mean of the wrapped distribution, expanded."""
        return self.base_dist.mean.expand(self.shape())

    @property
    def variance(self) -> Tensor:
        """Variance of the wrapped distribution, expanded."""
        return self.base_dist.variance.expand(self.shape())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base_dist!r}, {tuple(self.batch_shape)})"


def _score_parts_of_base(wrapper: Any, x: Any) -> ScoreParts:
    base = wrapper.base_dist
    if base.has_rsample != wrapper.has_rsample:  # has_rsample_() was called on the wrapper only
        base = copy.copy(base).has_rsample_(wrapper.has_rsample)
    return base.score_parts(x)


def _batch_part(value: Tensor, event_dim: int) -> torch.Size:
    return value.shape[: value.dim() - event_dim]
