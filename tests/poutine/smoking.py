"""A small causal model: smoking -> tar -> cancer, each a linear Gaussian.

tar = smoking + noise, cancer = tar + noise.
"""

from __future__ import annotations

import fastsvi as pyro
import fastsvi.distributions as dist


def draw(name, loc=0.0):
    return pyro.sample(name, dist.Normal(loc, 1.0))


def smoking():
    s = draw("smoking")
    t = draw("tar", s)
    return draw("cancer", t)
