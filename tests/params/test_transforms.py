"""Constraints to codings, values to leaves, and the errors in between."""

from __future__ import annotations

import pytest
import torch
from pyro.distributions import constraints as pyro_constraints
from torch import nn
from torch.distributions import constraints as c
from torch.distributions import transform_to
from torch.distributions import transforms as tt

import fastsvi.settings
from fastsvi.distributions import constraints as fc
from fastsvi.errors import ConstraintError, DtypeError, ShapeError
from fastsvi.kernels.transforms import Kind
from fastsvi.params.transforms import Affine, UnknownConstraintError, coding_of, make_leaf


@pytest.mark.parametrize(
    ("constraint", "affine"),
    [
        (c.real, Affine(Kind.IDENTITY, 0, 1)),
        (c.real_vector, Affine(Kind.IDENTITY, 0, 1)),
        (c.independent(c.real, 2), Affine(Kind.IDENTITY, 0, 1)),
        (c.positive, Affine(Kind.EXP, 0, 1)),
        (c.nonnegative, Affine(Kind.EXP, 0, 1)),
        (c.independent(c.positive, 1), Affine(Kind.EXP, 0, 1)),
        (c.greater_than(2.5), Affine(Kind.EXP, 2.5, 1)),
        (c.greater_than(torch.tensor(2.5)), Affine(Kind.EXP, 2.5, 1)),
        (c.greater_than_eq(-1), Affine(Kind.EXP, -1, 1)),
        (c.less_than(3.0), Affine(Kind.EXP, 3, -1)),
        (c.unit_interval, Affine(Kind.SIGMOID, 0, 1)),
        (c.interval(-1.0, 3.0), Affine(Kind.SIGMOID, -1, 4)),
        (c.half_open_interval(0.0, 2.0), Affine(Kind.SIGMOID, 0, 2)),
        (fc.softplus_positive, Affine(Kind.SOFTPLUS, 0, 1)),
        (pyro_constraints.softplus_positive, Affine(Kind.SOFTPLUS, 0, 1)),
        (c.interval(torch.zeros(2), torch.ones(2)), None),
        (c.interval(1.0, 1.0), None),
        (c.greater_than(float("-inf")), None),
        (c.simplex, None),
        (c.lower_cholesky, None),
        (c.corr_cholesky, None),
        (c.cat([c.real, c.positive]), None),
        (fc.sphere, None),
        (fc.ordered_vector, None),
    ],
    ids=repr,
)
def test_elementwise_transforms_are_recognised(constraint, affine):
    coding = coding_of(constraint, "x")
    assert coding.affine == affine
    x = torch.linspace(-2, 2, 6, dtype=torch.float64).reshape(2, 3)
    if affine is None:
        return
    read = coding.read or (lambda x: x)
    assert torch.equal(read(x), transform_to(constraint)(x))
    functions = [lambda x: x, torch.exp, nn.functional.softplus, torch.sigmoid]
    kind, shift, scale = affine
    torch.testing.assert_close(shift + scale * functions[kind](x), transform_to(constraint)(x))


def test_a_class_of_a_known_name_is_not_taken_for_the_known_one():
    class Mine(c.Constraint):
        pass

    class ExpTransform(tt.ExpTransform):
        def _call(self, x):
            return 2 * x.exp()

    transform_to.register(Mine, lambda constraint: ExpTransform())
    coding = coding_of(Mine(), "x")
    assert coding.affine is None
    assert float(coding.read(torch.zeros(()))) == 2.0


def test_a_constraint_that_cannot_be_hashed(store):
    class Mine(type(c.positive)):
        __hash__ = None

        def __eq__(self, other):
            return True

    transform_to.register(Mine, lambda constraint: tt.ExpTransform())
    store.setdefault("x", torch.ones(2), Mine(0.0))
    assert store["x"].tolist() == [1.0, 1.0]
    assert store.constrain_all()["x"].tolist() == [1.0, 1.0]


def test_a_later_registration_is_noticed():
    class Mine(c.Constraint):
        pass

    mine = Mine()
    transform_to.register(Mine, lambda constraint: tt.ExpTransform())
    assert coding_of(mine, "x").affine == (Kind.EXP, 0.0, 1.0)
    transform_to.register(Mine, lambda constraint: tt.SigmoidTransform())
    assert coding_of(mine, "x").affine == (Kind.SIGMOID, 0.0, 1.0)


OUTSIDE = [
    (c.positive, torch.tensor([1.0, -1.0, 2.0]), "1 of 3 fail"),
    (c.positive, torch.tensor([1.0, 0.0]), "1 of 2 fail"),
    (c.positive, torch.tensor(float("nan")), "value nan"),
    (fc.softplus_positive, torch.tensor(-1.0), "value -1"),
    (c.nonnegative, torch.tensor(-1.0), "value -1"),
    (c.greater_than(2.0), torch.tensor([1.5]), "value 1.5"),
    (c.less_than(2.0), torch.tensor([2.5]), "value 2.5"),
    (c.unit_interval, torch.tensor([0.5, 1.5]), "1 of 2 fail"),
    (c.unit_interval, torch.tensor([-0.5, 1.5]), "2 of 2 fail"),
    (c.interval(-1.0, 1.0), torch.tensor([2.0]), "value 2"),
    (c.independent(c.positive, 1), torch.tensor([[1.0, -1.0]]), "range"),
    (c.simplex, torch.tensor([0.5, 0.7, -0.2]), "range"),
    (c.simplex, torch.tensor([0.0, 0.0]), "range"),
    (c.lower_cholesky, torch.tensor([[1.0, 0.0], [0.0, -1.0]]), "range"),
    (c.positive_definite, torch.tensor([[1.0, 0.0], [0.0, -1.0]]), None),
    (c.corr_cholesky, torch.full((2, 2), 3.0), "range"),
    (fc.sphere, torch.tensor([0.0, float("nan")]), "NaN"),
    (fc.ordered_vector, torch.tensor([2.0, 1.0]), "range"),
]


@pytest.mark.parametrize(("constraint", "value", "words"), OUTSIDE, ids=lambda x: str(x)[:30])
def test_7_a_value_outside_its_constraint_is_refused(store, constraint, value, words):
    store["other"] = torch.zeros(1)
    version = store.version
    expected = ConstraintError if words else (ConstraintError, ShapeError)
    with pytest.raises(expected, match=r"param 'scale'.*") as caught:
        store.setdefault("scale", value, constraint)
    assert words is None or words in str(caught.value)
    assert repr(constraint) in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert list(store) == ["other"]
    assert dict(store._constraints) == {"other": c.real}
    assert store.version == version
    assert not value.requires_grad


@pytest.mark.parametrize(
    ("constraint", "value"),
    [
        (c.unit_interval, torch.tensor([1.0 + 1e-7, 0.5])),  # rounding of a division
        (c.half_open_interval(0.0, 1.0), torch.tensor([1.0])),
        (c.simplex, torch.ones(100_000)),  # too long for torch's own check in float32
        (c.simplex, torch.ones(100_000) / 100_000),
        (c.simplex, torch.tensor([2.0, 0.0, 3.0])),
        (fc.sphere, torch.tensor([3.0, 4.0])),
        (c.lower_cholesky, torch.ones(2, 2)),
    ],
    ids=lambda x: str(x)[:20],
)
def test_7_what_pyro_programs_may_rely_on_is_taken(store, constraint, value):
    with torch.no_grad():
        read = store.setdefault("x", value, constraint)
        assert read.shape == value.shape
        assert not bool(read.isnan().any())


def test_nan_is_let_through_where_there_is_no_constraint(store):
    assert bool(store.setdefault("x", torch.full((2,), float("nan"))).isnan().all())


def test_validation_can_be_switched_off(store):
    with fastsvi.settings.context(validate="never"):
        store.setdefault("x", torch.tensor(-1.0), c.positive)
    assert bool(store["x"].isnan())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1.5, r"found float 1.5; write torch.tensor\(1.5\)"),
        (True, r"found bool True; write torch.tensor\(True\)"),
        ([1.0], r"a tensor or a function that returns one, found list \[1.0\]"),
        (None, "found NoneType None"),
        (torch.tensor([1, 2]), r"shape \(2,\), int64.*convert it with .float"),
        (torch.tensor([True]), r"bool.*convert it with .float"),
        (torch.eye(2).to_sparse(), r"layout torch.sparse_coo.*to_dense"),
    ],
)
def test_6_what_is_not_a_float_tensor_is_refused(store, value, words):
    for init in (value, lambda: value):
        with pytest.raises(DtypeError, match=f"param 'x'.*{words}") as caught:
            store.setdefault("x", init, c.real_vector)
        assert isinstance(caught.value, TypeError)
    with pytest.raises(DtypeError, match=words):
        store["x"] = value
    assert not store
    assert not store._constraints
    store["x"] = torch.tensor(-1.0)  # no orphan constraint is left from above
    assert store.constraint("x") is c.real


def test_6_integers_are_taken_where_their_unconstrained_values_are_floats(store):
    store.setdefault("x", torch.tensor([1, 2]), c.positive)
    assert store["x"].tolist() == [1.0, 2.0]
    assert store.leaf("x").dtype == torch.float32
    with pytest.raises(ConstraintError, match="int64"):
        store.setdefault("y", torch.tensor([1, -2]), c.positive)


def test_6_an_error_in_a_lazy_init_leaves_nothing(store):
    with pytest.raises(ZeroDivisionError):
        store.setdefault("x", lambda: 1 / 0, c.positive)
    assert not store._constraints
    assert store.get_state() == {"params": {}, "constraints": {}}


@pytest.mark.parametrize(
    ("constraint", "value"),
    [
        (c.lower_cholesky, torch.ones(3)),
        (c.corr_cholesky, torch.ones(2, 3)),
        (c.interval(torch.zeros(3), torch.ones(3)), torch.ones(4) / 2),
        (c.cat([c.real, c.positive], lengths=[2, 2]), torch.ones(3)),
    ],
    ids=lambda x: str(x)[:20],
)
def test_a_wrong_shape_is_named(store, constraint, value):
    with pytest.raises((ShapeError, ConstraintError), match="param 'x'"):
        store.setdefault("x", value, constraint)
    assert not store


@pytest.mark.parametrize(
    "constraint", [c.boolean, c.dependent, c.nonnegative_integer, c.symmetric, c.square]
)
def test_a_constraint_without_a_transform_is_named(store, constraint):
    with pytest.raises(UnknownConstraintError, match=r"param 'x'.*no transform") as caught:
        store.setdefault("x", torch.ones(2, 2), constraint)
    assert isinstance(caught.value, NotImplementedError)
    assert not store


def test_a_value_that_is_not_a_leaf_is_copied(store):
    source = torch.ones(2, requires_grad=True)
    value = source * 3
    leaf = store.setdefault("x", value)
    assert leaf.is_leaf
    assert leaf is not value
    assert leaf.tolist() == [3.0, 3.0]
    leaf.sum().backward()
    assert leaf.grad.tolist() == [1.0, 1.0]
    assert source.grad is None
    with torch.no_grad():
        leaf.zero_()
    assert value.tolist() == [3.0, 3.0]


def test_inside_vmap_the_error_says_so(store):
    def program(x):
        return store.setdefault("x", x) * 2

    with pytest.raises(DtypeError, match=r"param 'x' was first met inside torch.func.vmap"):
        torch.func.vmap(program)(torch.zeros(3))
    assert not store


def test_while_tracing_with_fake_tensors_the_error_says_so(store):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(DtypeError, match=r"param 'x' cannot be a FakeTensor"):
        store.setdefault("x", torch.zeros(3))
    assert not store


def test_a_param_can_be_read_inside_vmap(store):
    store.setdefault("x", torch.ones(2), c.positive)
    assert torch.func.vmap(lambda a: store["x"] * a)(torch.arange(3.0)).shape == (3, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("constraint", [c.positive, c.unit_interval, c.simplex])
def test_dtypes(dtype, constraint):
    value = torch.tensor([0.25, 0.75], dtype=dtype)
    leaf = make_leaf("x", value, constraint)
    assert leaf.dtype == dtype
    eps = torch.finfo(dtype).eps
    back = transform_to(constraint)(leaf)
    torch.testing.assert_close(back, value, rtol=8 * eps, atol=8 * eps)
