"""Ordinal regression: ordered categories from a predictor and cutpoints."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastsvi.distributions import constraints
from fastsvi.distributions.discrete import Categorical
from fastsvi.distributions.util import Shape

__all__ = ["OrderedLogistic"]


class OrderedLogistic(Categorical):
    """Category ``k`` if a logistic variable around ``predictor`` falls between cutpoints.

    ``cutpoints`` ``(..., K - 1)`` increase along the last dimension; ``predictor`` broadcasts
    against their other dimensions. ``P(value <= k) = sigmoid(cutpoints[k] - predictor)``.

    >>> OrderedLogistic(torch.tensor(0.0), torch.tensor([0.0])).probs
    tensor([0.5000, 0.5000])
    """

    arg_constraints: ClassVar = {  # type: ignore[misc]
        "predictor": constraints.real,
        "cutpoints": constraints.ordered_vector,
    }

    def __init__(
        self, predictor: Tensor, cutpoints: Tensor, validate_args: bool | None = None
    ) -> None:
        above = cutpoints - torch.as_tensor(predictor).unsqueeze(-1)
        self.predictor = torch.as_tensor(predictor).expand(above.shape[:-1])
        self.cutpoints = cutpoints.expand(above.shape)
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)): nothing cancels when
        # both are close to 0 or to 1.
        at_most, at_least = logsigmoid(above), logsigmoid(-above)
        gap = (above[..., 1:] - above[..., :-1]).neg().expm1().neg().log()
        between = at_most[..., 1:] + at_least[..., :-1] + gap
        logits = torch.cat([at_most[..., :1], between, at_least[..., -1:]], -1)
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Any:
        """This distribution at another batch shape."""
        new = object.__new__(type(self)) if _instance is None else _instance
        shape = torch.Size(batch_shape)
        new.predictor = self.predictor.expand(shape)
        new.cutpoints = self.cutpoints.expand((*shape, -1))
        return super().expand(shape, new)
