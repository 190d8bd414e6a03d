"""Both ways over samples give the same, and what cannot be done at once is said."""

from __future__ import annotations

import pytest
import torch

import fastsvi.distributions as dist
from fastsvi.errors import FastSVIWarning, ShapeError
from fastsvi.infer.over_samples import over_samples


def test_loop_and_vmap_agree_on_nested_results():
    samples = {"a": torch.randn(5), "b": torch.randn(5, 2, 3)}

    def fn(sample):
        return {"sum": sample["a"] + sample["b"], "parts": (sample["a"], [sample["b"][0]])}

    loop, at_once = (over_samples(fn, samples, 5, parallel=parallel) for parallel in (False, True))
    for result in (loop, at_once):
        assert torch.equal(result["sum"], samples["a"][:, None, None] + samples["b"])
        assert torch.equal(result["parts"][0], samples["a"])
        assert torch.equal(result["parts"][1][0], samples["b"][:, 0])


@pytest.mark.parametrize("parallel", [False, True])
def test_every_sample_draws_its_own_numbers(parallel):
    drawn = over_samples(lambda _: torch.rand(()), {}, 100, parallel=parallel)
    assert drawn.shape == (100,)
    assert len(drawn.unique()) > 95


@pytest.mark.parametrize("parallel", [False, True])
def test_a_result_that_ignores_its_sample_is_repeated(parallel):
    out = over_samples(lambda _: torch.arange(3), {"a": torch.rand(4)}, 4, parallel=parallel)
    assert torch.equal(out, torch.arange(3).expand(4, 3))


@pytest.mark.parametrize(
    "fn",
    [
        lambda s: torch.tensor(s["a"].item()),
        lambda s: s["a"] if s["a"] > 0 else -s["a"],
        lambda s: torch.tensor(s["a"].tolist()),
        lambda s: [s["a"], "text"][0] if float(s["a"]) < 9 else None,
    ],
)
def test_what_vmap_cannot_run_runs_in_a_loop(fn):
    samples = {"a": torch.tensor([1.0, 2.0])}
    with pytest.warns(FastSVIWarning, match="2 samples at once.*torch.func.vmap says"):
        out = over_samples(fn, samples, 2, parallel=True)
    assert torch.equal(out, samples["a"])


def test_results_that_are_no_tensors_come_back_as_a_list():
    assert over_samples(lambda s: f"{s['a']:.0f}", {"a": torch.arange(2.0)}, 2, parallel=False) == [
        "0",
        "1",
    ]


def test_samplers_without_a_rule_for_vmap_stay_silent():
    """torch's own Gamma clamps in place, which vmap does in a loop of its own, with a warning."""
    rates = torch.tensor([1.0, 10.0])
    drawn = over_samples(
        lambda s: dist.InverseGamma(3.0, s["rate"]).sample((4000,)),
        {"rate": rates},
        2,
        parallel=True,
    )
    # Mean rate / 2 and sd rate / 2; five standard errors.
    torch.testing.assert_close(drawn.mean(1), rates / 2, rtol=5 / 4000**0.5, atol=0)


def test_checks_of_arguments_are_off_at_once_and_on_again_after():
    samples = {"scale": torch.tensor([1.0, 2.0])}
    before = torch.distributions.Distribution._validate_args
    out = over_samples(lambda s: dist.Normal(0.0, s["scale"]).mean, samples, 2, parallel=True)
    assert out.shape == (2,)
    assert torch.distributions.Distribution._validate_args == before


def test_shapes_that_differ_are_named():
    def fn(sample):
        return {"x": torch.zeros(int(sample["n"]))}

    with pytest.raises(ShapeError, match=r"'x' has another shape.*\(1,\), \(2,\)"):
        over_samples(fn, {"n": torch.tensor([1, 2])}, 2, parallel=False)
