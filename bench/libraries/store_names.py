"""Names of the parameters in the stores of fastsvi and Pyro."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bench.workloads import Array


def named(params: Mapping[str, Tensor]) -> dict[str, Array]:
    """The parameters by the names that the evaluator reads."""
    kinds = {"AutoNormal.locs.": "loc.", "AutoNormal.scales.": "scale."}
    found = {}
    for name, value in params.items():
        for prefix, kind in kinds.items():
            if name.startswith(prefix):
                name = kind + name[len(prefix) :]
        found[name.replace("$$$", ".")] = value.detach().cpu().numpy()
    return found
