"""What inference asks of any stochastic function, whether or not it is a torch distribution."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastsvi.distributions.score_parts import ScoreParts

__all__ = ["Distribution"]


class Distribution:
    """A stochastic function with fixed parameters.

    Derive from it directly only if the values are not tensors of a fixed shape; otherwise derive
    from :class:`~fastsvi.distributions.TorchDistribution`. A subclass defines ``sample(...)`` and
    ``log_prob(value, ...)``.

    >>> import torch
    >>> class Coin(Distribution):
    ...     def sample(self):
    ...         return "heads"
    ...     def log_prob(self, value):
    ...         return torch.tensor(0.5).log()
    >>> Coin()()
    'heads'
    >>> Coin().score_parts("heads").entropy_term
    0
    """

    has_rsample: bool = False
    has_enumerate_support: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Draw a value: ``sample(*args, **kwargs)``."""
        return self.sample(*args, **kwargs)  # type: ignore[attr-defined]

    def score_parts(self, x: Any, *args: Any, **kwargs: Any) -> ScoreParts:
        """Terms of the ELBO gradient estimator for value ``x``.

        Right for samples that are reparameterized either fully or not at all; a distribution that
        is partly reparameterized overrides it.
        """
        log_prob = self.log_prob(x, *args, **kwargs)  # type: ignore[attr-defined]
        if self.has_rsample:
            return ScoreParts(log_prob, 0, log_prob)
        return ScoreParts(log_prob, log_prob, 0)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All values of a discrete distribution, stacked along a new leftmost dimension.

        Shape ``(n,) + batch_shape + event_shape``; with ``expand=False`` the batch dimensions
        have size 1.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot enumerate its support")

    def conjugate_update(self, other: Any) -> Any:
        """Fuse with another distribution; no family of fastsvi implements it."""
        raise NotImplementedError(f"{type(self).__name__} has no conjugate_update()")

    def has_rsample_(self, value: bool) -> Distribution:
        """Choose between pathwise (``True``) and score function (``False``) gradients, in place.

        ``d.has_rsample_(False)`` makes inference treat the samples of ``d`` as if they were not
        reparameterized, for values that decide control flow discontinuously. Returns ``self``.
        """
        if value is not True and value is not False:
            raise ValueError(f"has_rsample_ takes True or False, found {value!r}")
        self.has_rsample = value
        return self
