"""Dense and autoregressive networks under both libraries: same weights, same outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

NETWORKS = {
    "dense": lambda lib: lib.nn.DenseNN(4, [5, 6], param_dims=[1, 3]),
    "dense_single": lambda lib: lib.nn.DenseNN(4, [5], param_dims=[2]),
    "dense_scalar": lambda lib: lib.nn.DenseNN(4, [5], param_dims=[1], nonlinearity=nn.Tanh()),
    "autoregressive": lambda lib: lib.nn.AutoRegressiveNN(4, [5, 8]),
    "autoregressive_many": lambda lib: lib.nn.AutoRegressiveNN(
        4, [7], param_dims=[1, 3, 2], skip_connections=True
    ),
    "autoregressive_single": lambda lib: lib.nn.AutoRegressiveNN(
        4, [9], param_dims=[3], permutation=torch.tensor([2, 0, 3, 1])
    ),
    "autoregressive_scalar": lambda lib: lib.nn.AutoRegressiveNN(4, [9], param_dims=[1]),
}
CONDITIONAL = {
    "dense": lambda lib: lib.nn.ConditionalDenseNN(4, 3, [5, 6], param_dims=[1, 3]),
    "autoregressive": lambda lib: lib.nn.ConditionalAutoRegressiveNN(
        4, 3, [5, 8], skip_connections=True
    ),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_networks(same, make):
    def program(lib):
        network = make(lib)
        return network(torch.randn(2, 3, 4)), list(network.state_dict().items())

    same(program)


@pytest.mark.parametrize("make", CONDITIONAL.values(), ids=CONDITIONAL.keys())
def test_conditional_networks(same, make):
    def program(lib):
        network = make(lib)
        outputs = network(torch.randn(2, 3, 4), context=torch.randn(3))
        return outputs, list(network.state_dict().items())

    same(program)
