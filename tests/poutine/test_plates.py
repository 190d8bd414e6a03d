"""Plates: sizes, dims, subsampling, and what is said about mistakes."""

from __future__ import annotations

import gc

import pytest
import torch

import fastsvi as pyro
import fastsvi.distributions as dist
from fastsvi import poutine
from fastsvi.errors import ShapeError
from fastsvi.poutine.errors import PlateError
from fastsvi.poutine.indep_messenger import CondIndepStackFrame, IndepMessenger
from fastsvi.poutine.plate_messenger import block_plate
from fastsvi.poutine.runtime import STACK, get_plates
from fastsvi.poutine.subsample_messenger import draw_subset, is_full, stand_in


def standard_normal():
    return dist.Normal(0.0, 1.0)


# ---- mistakes ----


def test_batch_shape_against_plate_size():
    with (
        pyro.plate("data", 5),
        poutine.trace(),
        pytest.raises(
            ShapeError,
            match=r"shape mismatch at site 'obs': batch shape \(3,\) but plate 'data' has size 5 "
            r"at dim -1",
        ),
    ):
        pyro.sample("obs", dist.Normal(torch.zeros(3), 1.0))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"size": 0}, "size zero"),
        ({"size": -2}, "negative"),
        ({"size": 2.5}, "integer.*2.5"),
        ({"size": "3"}, "integer"),
        ({"size": 5, "subsample_size": 6}, "between 1 and size=5.*6"),
        ({"size": 5, "subsample_size": 0}, "between 1 and size=5.*0"),
        ({"size": 5, "subsample_size": 2, "subsample": torch.arange(3)}, "=2 does not match the 3"),
        ({"size": 5, "subsample": torch.arange(0)}, "empty"),
        ({"subsample_size": 2}, "full size"),
        ({"subsample": torch.arange(2)}, "full size"),
        ({"size": 5, "use_cuda": True, "device": "cpu"}, "contradicts"),
    ],
)
def test_bad_arguments(arguments, what):
    with pytest.raises(PlateError, match=f"'data'.*{what}|{what}"):
        pyro.plate("data", **arguments)
    assert STACK == []


def test_error_types_are_those_of_pyro(lib):
    with pytest.raises(ZeroDivisionError):
        lib.pyro.plate("data", 0)
    for second, what in (("b", "collide"), ("a", "duplicate plate 'a'")):
        outer, inner = lib.pyro.plate("a", 2, dim=-1), lib.pyro.plate(second, 2, dim=-1)
        with outer, pytest.raises(ValueError, match=what), inner:
            pass
    with pytest.raises(ValueError, match="dim"), lib.pyro.plate("a", 2, dim=0):
        pass
    with pytest.raises(ValueError, match="subsample_size"):
        lib.pyro.plate("a", 2, subsample_size=3)
    both = lib.pyro.plate("a", 2)
    with both, pytest.raises(ValueError, match="vectorized"):
        list(both)


def test_collision_names_both_plates_and_a_free_dim():
    with (
        pyro.plate("a", 2, dim=-1),
        pyro.plate("b", 3, dim=-2),
        pytest.raises(PlateError, match=r"'c' and 'a' collide at dim=-1.*dim=-3"),
        pyro.plate("c", 4, dim=-1),
    ):
        pass


def test_name_must_be_a_string():
    with pytest.raises(TypeError, match="name must be a string"):
        pyro.plate(5)


def test_plate_stack_needs_a_negative_dim():
    with pytest.raises(PlateError, match="negative"), pyro.plate_stack("a", (2,), 0):
        pass


# ---- dims ----


def test_automatic_dims_fill_gaps():
    with pyro.plate("a", 2, dim=-2), pyro.plate("b", 3), pyro.plate("c", 4):
        assert {f.name: f.dim for f in get_plates()} == {"a": -2, "b": -1, "c": -3}


def test_dims_are_free_again_after_an_exception():
    for _ in range(2):
        with pytest.raises(KeyError), pyro.plate("a", 2), pyro.plate("b", 3):
            raise KeyError
        with pyro.plate("b", 3):
            assert get_plates()[0].dim == -1


def test_dims_are_free_after_a_suspended_generator():
    """A generator that holds a plate open is left behind by an exception outside of it."""

    def batches():
        with pyro.plate("data", 2):
            yield 1
            yield 2

    def model():
        for _ in batches():
            raise KeyError("mine")

    held = []
    for _ in range(2):  # the second run would meet the first one's plate
        with pytest.raises(KeyError, match="mine") as caught:
            poutine.block(model)()
        held.append(caught)
    with pyro.plate("data", 2):
        assert get_plates()[0].dim == -1
    held.clear()
    gc.collect()
    assert STACK == []


def test_a_plate_keeps_its_dim_when_it_is_used_again():
    inner = pyro.plate("inner", 3)
    with pyro.plate("outer", 2), inner:
        pass
    with inner:
        assert inner.dim == -2


def test_reused_plate_shares_its_indices():
    plate = pyro.plate("data", 100, subsample_size=3)
    with plate as first:
        pass
    with plate as second:
        pass
    assert first is second


def test_who_asks_for_indices_that_a_site_only_stands_for_gets_them():
    def program():
        with pyro.plate("data", 100) as indices:
            return indices

    class Substituting(poutine.messenger.Messenger):
        def _pyro_sample(self, msg):
            msg.value = stand_in(100)

    with Substituting():
        assert torch.equal(program(), torch.arange(100))
        assert is_full(program())
        traced = poutine.trace(program).get_trace().nodes["data"]["value"]
    assert traced.shape == (100,)
    assert traced.untyped_storage().nbytes() == 8


def test_frames_compare_without_full_size():
    a, b = CondIndepStackFrame("a", -1, 2, 0, 5), CondIndepStackFrame("a", -1, 2, 0)
    assert a == b
    assert hash(a) == hash(b)
    assert a != CondIndepStackFrame("a", -1, 2, 1, 5)
    assert a != ("a", -1, 2, 0)
    assert str(a) == "a"
    assert a.vectorized
    assert not CondIndepStackFrame("a", None, 2, 0).vectorized


# ---- broadcasting ----


def test_one_expansion_a_site_however_deep():
    count = []

    class Counting(dist.Normal):
        def expand(self, batch_shape, _instance=None):
            count.append(tuple(batch_shape))
            return super().expand(batch_shape, _instance)

    fn = Counting(0.0, 1.0)
    with pyro.plate("a", 2), pyro.plate("b", 3), pyro.plate("c", 4):
        assert pyro.sample("x", fn).shape == (4, 3, 2)
    assert count == [(4, 3, 2)]
    with pyro.plate("a", 2), poutine.scale(scale=2.0), pyro.plate("b", 3):
        pyro.sample("x", fn)
    assert count[1:] == [(3, 1), (3, 2)]  # a handler in between may look at the distribution


def test_no_expansion_where_the_shape_is_right():
    fn = dist.Normal(torch.zeros(2), 1.0)
    with pyro.plate("a", 2), poutine.trace() as tracer:
        pyro.sample("x", fn)
    assert tracer.trace.nodes["x"].fn is fn


def test_expansion_keeps_has_rsample():
    fn = standard_normal().has_rsample_(False)
    with pyro.plate("a", 2), poutine.trace() as tracer:
        pyro.sample("x", fn)
    assert tracer.trace.nodes["x"].fn.batch_shape == (2,)
    assert not tracer.trace.nodes["x"].fn.has_rsample


def test_broadcast_handler(lib):
    Indep = IndepMessenger
    if lib.pyro.__name__ == "pyro":
        from pyro.poutine.indep_messenger import IndepMessenger as Indep

    @lib.poutine.broadcast
    def model():
        with Indep("a", 2, dim=-2), Indep("b", 3, dim=-1):
            return lib.pyro.sample("x", lib.dist.Normal(torch.zeros(3), 1.0))

    assert model().shape == (2, 3)


def test_block_plate():
    with pyro.plate("a", 2), pyro.plate("b", 3):
        with block_plate("a"):
            assert pyro.sample("x", standard_normal()).shape == (3, 1)
        with block_plate("b"):
            assert pyro.sample("x", standard_normal()).shape == (2,)
            with pyro.plate("c", 4):  # b's dim stays taken
                assert pyro.sample("x", standard_normal()).shape == (4, 1, 2)
        with pytest.raises(PlateError, match="0 enclosing plates with name 'c'"), block_plate("c"):
            pass
        with block_plate("c", strict=False):
            assert pyro.sample("x", standard_normal()).shape == (3, 2)
        with pytest.raises(PlateError, match="either"), block_plate("a", -1):
            pass
        assert pyro.sample("x", standard_normal()).shape == (3, 2)


# ---- subsampling ----


def test_subsample_is_a_subset():
    plate = pyro.plate("data", 50, subsample_size=20)
    with plate as i:
        assert i.shape == (20,)
        assert i.unique().numel() == 20
        assert ((i >= 0) & (i < 50)).all()
        assert len(plate) == 20


def test_large_subsets_take_no_time_in_proportion_to_the_whole():
    """10^11 indices could not even be allocated."""
    first, second = (draw_subset(10**11, 1000) for _ in range(2))
    assert first.unique().numel() == 1000
    assert ((first >= 0) & (first < 10**11)).all()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    a = draw_subset(10**11, 10)
    torch.manual_seed(5)
    assert torch.equal(draw_subset(10**11, 10), a)


def test_small_subsets_are_those_of_pyro(ours, theirs):
    drawn = []
    for lib in (ours, theirs):
        torch.manual_seed(3)
        with lib.pyro.plate("data", 1000, subsample_size=10) as i:
            drawn.append(i)
    assert torch.equal(*drawn)


def test_scaling_makes_subsampled_densities_unbiased():
    """The mean over all subsets of the scaled density is the full density."""
    data = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)

    def model(subsample):
        with pyro.plate("data", 4, subsample=subsample) as i:
            pyro.sample("obs", standard_normal(), obs=data[i])

    def density(subsample):
        return poutine.trace(model).get_trace(subsample).log_prob_sum()

    subsets = torch.combinations(torch.arange(4))
    mean = torch.stack([density(subset) for subset in subsets]).mean()
    torch.testing.assert_close(mean, density(torch.arange(4)))


@pytest.mark.parametrize("subsample", [[2, 0], torch.tensor([2, 0])])
def test_given_subsample(subsample):
    with pyro.plate("data", 4, subsample=subsample) as i:
        assert i is subsample
        assert pyro.sample("x", standard_normal()).shape == (2,)
        data = pyro.subsample(torch.arange(4.0), event_dim=0)
        assert data.tolist() == [2.0, 0.0]
    assert list(pyro.plate("loop", 4, subsample=subsample)) == [2, 0]


@pytest.mark.parametrize("event_dim", [0, 1])
def test_subsample_takes_event_dim_in_any_form(event_dim):
    data = torch.randn((5, 2)[: 1 + event_dim])
    with pyro.plate("data", 5, subsample_size=3) as i:
        assert torch.equal(pyro.subsample(data, event_dim=event_dim), data[i])
        assert torch.equal(pyro.subsample(data, event_dim), data[i])


def test_subsample_in_nested_plates():
    data = torch.randn(6, 4, 2)
    rows = pyro.plate("rows", 6, subsample_size=3, dim=-2)
    columns = pyro.plate("columns", 4, subsample_size=2, dim=-1)
    with rows as i, columns as j:
        assert torch.equal(pyro.subsample(data, event_dim=1), data[i][:, j])
        assert pyro.subsample(torch.zeros(6, 1), event_dim=0).shape == (3, 1)


def test_subsample_outside_of_plates_and_of_full_plates():
    data = torch.randn(5)
    assert pyro.subsample(data, event_dim=0) is data
    with pyro.plate("data", 5):
        assert pyro.subsample(data, event_dim=0) is data


def test_subsample_of_the_wrong_shape():
    with (
        pyro.plate("data", 5, subsample_size=3),
        pytest.raises(ShapeError, match=r"'data', 5, dim=-1.*size 5.*shape \(4,\)"),
    ):
        pyro.subsample(torch.zeros(4), event_dim=0)
    with pytest.raises(PlateError, match="event_dim"):
        pyro.subsample(torch.zeros(4), event_dim=-1)


def test_param_of_the_wrong_shape():
    with (
        pyro.plate("data", 5, subsample_size=3),
        pytest.raises(ShapeError, match=r"param 'w'.*size 5"),
    ):
        pyro.param("w", torch.zeros(4), event_dim=0)


def test_subsampled_param_reaches_its_leaf():
    with pyro.plate("data", 5, subsample=torch.tensor([3, 1])):
        part = pyro.param("w", torch.arange(5.0), event_dim=0)
    assert part.tolist() == [3.0, 1.0]
    leaf = pyro.get_param_store().leaf("w")
    assert part.unconstrained() is leaf
    assert leaf._pyro_subsample[-1].tolist() == [3, 1]
    part.sum().backward()
    assert leaf.grad.tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]


def test_model_and_guide_share_a_subsample():
    seen = []

    def program():
        with pyro.plate("data", 1000, subsample_size=5) as i:
            seen.append(i)
            pyro.sample("x", standard_normal())

    trace = poutine.trace(program).get_trace()
    poutine.replay(program, trace=trace)()
    assert seen[0] is seen[1]


@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize(
    ("model_size", "guide_size", "agree"),
    [
        (20, 20, True), (20, None, True), (5, 5, True), (None, 20, True), (None, 5, True),
        (None, None, True), (20, 5, False), (5, 20, False), (5, None, False),
    ],
)  # fmt: skip
def test_subsample_sizes_of_model_and_guide(model_size, guide_size, agree, loop, lib):
    def program(size):
        plate = lib.pyro.plate("data", 20, subsample_size=size)
        if loop:
            return list(plate)
        with plate as i:
            return i.tolist()

    guide = lib.poutine.trace(program)
    indices = guide(guide_size)
    replayed = lib.poutine.replay(program, trace=guide.trace)
    if agree:
        assert replayed(model_size) == indices
    else:
        with pytest.raises(ValueError, match="subsample_size"):
            replayed(model_size)


# ---- sequential plates ----


def test_loop_over_a_full_plate_reads_no_tensor():
    def loop(x):
        return sum(x * i for i in pyro.plate("loop", 3))

    graph = torch.fx.experimental.proxy_tensor.make_fx(loop)(torch.tensor(1.0))
    assert graph(torch.tensor(2.0)) == 6.0


def test_counters_tell_the_turns_apart():
    with poutine.trace() as tracer:
        for i in pyro.plate("loop", 2):
            pyro.sample(f"x_{i}", standard_normal())
            pyro.sample(f"y_{i}", standard_normal())
    nodes = tracer.trace.nodes
    frames = {name: nodes[name].cond_indep_stack[0] for name in ("x_0", "y_0", "x_1")}
    assert frames["x_0"] == frames["y_0"] != frames["x_1"]


def test_sequential_scale():
    with poutine.trace() as tracer:
        for i in pyro.plate("loop", 6, subsample_size=2):
            pyro.sample(f"x_{i}", standard_normal())
    assert [tracer.trace.nodes[n].scale for n in tracer.trace.stochastic_nodes[1:]] == [3.0, 3.0]


def test_len():
    assert len(pyro.plate("data", 7)) == 7
    assert len(pyro.plate("data", 7, subsample_size=3)) == 3
    with pytest.raises(TypeError, match="without a size"):
        len(pyro.plate("data"))
    assert pyro.plate("data")


def test_devices():
    with pyro.plate("data", 3, device="meta") as i:
        assert i.device.type == "meta"
    with pyro.plate("data", 3, use_cuda=False) as i:
        assert i.device.type == "cpu"
    with torch.device("meta"), pyro.plate("data", 3, subsample_size=2) as i:
        assert i.device.type == "meta"


# ---- deprecated names ----


def test_iarange_and_irange(lib):
    with pytest.warns(DeprecationWarning, match="plate"):
        plate = lib.pyro.iarange("a", 3)
    with plate as i:
        assert i.tolist() == [0, 1, 2]
    with pytest.warns(DeprecationWarning, match="plate"):
        assert list(lib.pyro.irange("a", 3)) == [0, 1, 2]
