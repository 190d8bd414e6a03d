"""The log-joint density of a model as a function of its latent values, without a trace.

:func:`log_density` is what engines call in a step: one handler, no copies of messages, no host
synchronisation, so that it runs under ``torch.func.vmap`` and is captured by ``make_fx``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastsvi.distributions.util import scale_and_mask, validation_enabled
from fastsvi.errors import SiteError
from fastsvi.poutine.evaluate import evaluate
from fastsvi.poutine.message import Message
from fastsvi.poutine.messenger import Messenger
from fastsvi.poutine.util import site_is_subsample


class DensityMessenger(Messenger):
    """Substitutes values at latent sites and adds up the log-densities of all sample sites.

    ``values`` and ``params`` map names to constrained values. Latent sites that ``values`` lacks
    are sampled, params that ``params`` lacks come from the store. Afterwards :attr:`sites` holds
    the messages of the sample sites.
    """

    def __init__(self, values: Mapping[str, Any], params: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.values = values
        self.params = {} if params is None else params
        self.sites: dict[str, Message] = {}
        self._total: torch.Tensor | None = None

    def __enter__(self) -> DensityMessenger:
        self.sites = {}
        self._total = None
        return super().__enter__()

    @property
    def log_joint(self) -> torch.Tensor:  # []
        """Sum of the scaled, masked log-densities."""
        return torch.zeros(()) if self._total is None else self._total

    def _pyro_sample(self, msg: Message) -> None:
        if not msg.is_observed and msg.name in self.values:
            msg.value = self.values[msg.name]
            msg.done = True

    def _pyro_param(self, msg: Message) -> None:
        if msg.name in self.params:
            msg.value = self.params[msg.name]
            msg.done = True

    # We stand outside of the model, so all its plates, scales and masks have seen the message.
    def _pyro_post_sample(self, msg: Message) -> None:
        name = msg.name
        infer = msg.infer
        if infer and infer.get("_do_not_trace"):
            return
        if name in self.sites:
            raise SiteError(
                f"Multiple sample sites named {name!r}: a model may use a name once in a run; in a "
                f'loop, number them as in f"{name}_{{i}}"'
            )
        self.sites[name] = msg
        # These have density one by definition.
        if msg.mask is False or infer.get("_deterministic") or site_is_subsample(msg):
            return
        log_prob = evaluate(msg, "log_prob", name, self.sites)
        log_prob = scale_and_mask(log_prob, msg.scale, msg.mask).sum()
        self._total = log_prob if self._total is None else self._total + log_prob


def log_density(
    model: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    values: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
) -> tuple[torch.Tensor, dict[str, Message]]:
    """Run ``model(*args, **kwargs)`` with given latent values and return its log-joint density.

    Args:
        values: constrained values of latent sites by name; sites that are missing are sampled.
        params: constrained values of params by name; missing ones come from the store.

    Returns:
        The log-joint density, a scalar equal to ``poutine.trace(...).get_trace().log_prob_sum()``,
        and the messages of the sample sites by name (their ``value`` is what was used). With no
        ``values`` this draws from a guide: the scalar is then log q of the draws.

    The arguments and values of distributions are not checked.

    >>> import fastsvi as pyro, fastsvi.distributions as dist
    >>> def model(data):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(data)):
    ...         pyro.sample("obs", dist.Normal(loc, 1.0), obs=data)
    >>> data = torch.zeros(3)
    >>> density = lambda loc: log_density(model, (data,), values={"loc": loc})[0]
    >>> torch.func.vmap(density)(torch.tensor([0.0, 1.0]))
    tensor([-3.6758, -5.6758])
    """
    messenger = DensityMessenger({} if values is None else values, params)
    with validation_enabled(False), messenger:
        model(*args, **({} if kwargs is None else kwargs))
    return messenger.log_joint, messenger.sites
