"""The same program text in fastsvi and in Pyro gives the same trace."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from trace_programs import PROGRAMS


def run(fn, lib):
    torch.manual_seed(1)
    return fn(lib)


def describe(value):
    """Something comparable by ``==``."""
    if isinstance(value, torch.Tensor):
        return ("tensor", str(value.dtype), value.shape, value.detach().tolist())
    if isinstance(value, dict):
        return {key: describe(item) for key, item in value.items()}
    return value


def frames(site):
    return [(f.name, f.dim, f.size, f.counter, f.full_size) for f in site["cond_indep_stack"]]


@pytest.mark.parametrize("name", PROGRAMS)
def test_same_trace_as_pyro(name, ours, theirs):
    actual = run(PROGRAMS[name], ours)
    expected = run(PROGRAMS[name], theirs)

    assert list(actual.nodes) == list(expected.nodes)
    for site_name, want in expected.nodes.items():
        have = actual.nodes[site_name]
        assert have["type"] == want["type"]
        if want["type"] not in ("sample", "param"):
            continue
        assert have["name"] == want["name"]
        assert describe(have["value"]) == describe(want["value"]), site_name
        assert frames(have) == frames(want)
        for key in ("is_observed", "scale", "mask", "infer", "done", "stop"):
            assert describe(have[key]) == describe(want[key]), (site_name, key)
        if want["type"] == "sample":
            shapes = [getattr(s["fn"], "batch_shape", None) for s in (have, want)]
            assert shapes[0] == shapes[1]
            shapes = [getattr(s["fn"], "event_shape", None) for s in (have, want)]
            assert shapes[0] == shapes[1]
        elif hasattr(want["value"], "unconstrained"):  # not where another value was substituted
            torch.testing.assert_close(have["value"].unconstrained(), want["value"].unconstrained())

    assert actual.format_shapes() == expected.format_shapes()
    total, want_total = actual.log_prob_sum(), expected.log_prob_sum()
    assert torch.as_tensor(total).shape == torch.as_tensor(want_total).shape
    # Both sum the same float32 terms, perhaps in another order.
    torch.testing.assert_close(
        torch.as_tensor(total), torch.as_tensor(want_total), rtol=1e-5, atol=1e-5
    )
    actual.compute_log_prob()
    expected.compute_log_prob()
    assert actual.format_shapes() == expected.format_shapes()
    assert sorted(actual.edges) == sorted(expected.edges)
    for kind in ("stochastic_nodes", "observation_nodes", "param_nodes", "reparameterized_nodes"):
        assert getattr(actual, kind) == getattr(expected, kind)
    assert set(actual.nonreparam_stochastic_nodes) == set(expected.nonreparam_stochastic_nodes)


@pytest.mark.parametrize("name", ["one_plate", "nested_subsampling", "enumerated_markov_chain"])
def test_same_packed_tensors_as_pyro(name, ours, theirs):
    actual, expected = run(PROGRAMS[name], ours), run(PROGRAMS[name], theirs)
    for trace in (actual, expected):
        trace.compute_log_prob()
        trace.pack_tensors()
    assert actual.plate_to_symbol == expected.plate_to_symbol
    assert actual.symbol_to_dim == expected.symbol_to_dim
    for site_name in expected.stochastic_nodes:
        have, want = (t.nodes[site_name]["packed"]["log_prob"] for t in (actual, expected))
        assert have._pyro_dims == want._pyro_dims
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("name", ["latent_and_observed", "scale_and_mask", "subsampled_plate"])
def test_same_score_parts_as_pyro(name, ours, theirs):
    actual, expected = run(PROGRAMS[name], ours), run(PROGRAMS[name], theirs)
    for trace in (actual, expected):
        trace.compute_score_parts()
    for site_name, want in expected.nodes.items():
        if want["type"] == "sample":
            have = actual.nodes[site_name]
            for a, b in zip(have["score_parts"], want["score_parts"], strict=True):
                torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b))
            torch.testing.assert_close(have["log_prob_sum"], want["log_prob_sum"])
            torch.testing.assert_close(have["unscaled_log_prob"], want["unscaled_log_prob"])


class TracelessPoutine:
    """Stands for ``poutine``, with ``trace`` replaced by the traceless log-density."""

    def __init__(self, poutine):
        self._poutine = poutine

    def __getattr__(self, name):
        return getattr(self._poutine, name)

    def trace(self, fn, graph_type=None, param_only=None):
        return SimpleNamespace(get_trace=lambda: self._poutine.log_density(fn))


# Those that trace once, and not to make values for a second run.
SINGLE = [n for n in PROGRAMS if n not in ("param_only", "replayed", "conditioned_on_a_trace")]


@pytest.mark.parametrize("name", SINGLE)
def test_log_density_equals_the_trace(name, ours):
    expected = run(PROGRAMS[name], ours)
    ours.pyro.clear_param_store()
    ours.poutine = TracelessPoutine(ours.poutine)
    log_joint, sites = run(PROGRAMS[name], ours)
    torch.testing.assert_close(log_joint, torch.as_tensor(expected.log_prob_sum()))
    assert list(sites) == [n for n, site in expected.nodes.items() if site.type == "sample"]
    for site_name, site in sites.items():
        assert describe(site.value) == describe(expected.nodes[site_name].value)
