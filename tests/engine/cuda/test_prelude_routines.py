"""The routines of generated CUDA that a whole team calls, in both forms and at several widths."""

from __future__ import annotations

import pytest
import torch

from fastsvi.kernels import philox, subsample

KINDS = {torch.float32: "float", torch.float64: "double"}


def _kernels() -> str:
    """A kernel for each routine and dtype; sizes are arguments."""
    text = ""
    for kind in KINDS.values():
        for drawn in ("normal", "uniform"):
            for few, name in ((0, ""), (1, "few_")):
                text += f"""
extern "C" __global__ void {name}{drawn}_{kind}({kind}* out, const int64_t* key,
    const int64_t* origin, int64_t group, int64_t f, int64_t p, int64_t e) {{
  EACH(i, f * p * e)
    out[i] = fn::{drawn}_at<{kind}, {few}>(key, origin, group, (int32_t)(i / (p * e)),
                                           (int32_t)(i / e % p), (int32_t)(i % e));
}}"""
        text += f"""
extern "C" __global__ void sum_{kind}({kind}* out, const {kind}* x, int64_t outer, int64_t n,
    int64_t inner) {{ running_sum(out, x, outer, n, inner); }}
extern "C" __global__ void product_{kind}({kind}* out, const {kind}* x, int64_t outer, int64_t n,
    int64_t inner) {{ running_product(out, x, outer, n, inner); }}
extern "C" __global__ void sort_{kind}({kind}* out, int64_t* places, const {kind}* x, int64_t outer,
    int64_t n, int64_t inner, int64_t descending) {{
  running_sort(out, places, x, outer, n, inner, descending);
}}
extern "C" __global__ void cholesky_{kind}({kind}* out, const {kind}* a, int64_t batch, int64_t n,
    int64_t upper) {{ linear_cholesky(out, a, batch, n, upper); }}
extern "C" __global__ void triangular_{kind}({kind}* x, const {kind}* a, const {kind}* b,
    int64_t batch, int64_t n, int64_t m, int64_t upper, int64_t left, int64_t unit) {{
  linear_triangular(x, a, b, batch, n, m, upper, left, unit);
}}
extern "C" __global__ void lu_{kind}({kind}* out, int32_t* pivots, const {kind}* a, int64_t batch,
    int64_t n) {{ linear_lu(out, pivots, a, batch, n); }}
extern "C" __global__ void lu_solve_{kind}({kind}* x, const {kind}* a, const int32_t* pivots,
    const {kind}* b, int64_t batch, int64_t n, int64_t m, int64_t adjoint) {{
  linear_lu_solve(x, a, pivots, b, batch, n, m, adjoint);
}}"""
    return (
        text
        + """
extern "C" __global__ void whole_sum(int64_t* out, const int64_t* x, int64_t outer, int64_t n,
    int64_t inner) { running_sum(out, x, outer, n, inner); }
extern "C" __global__ void sorted(int64_t* out, const int64_t* key, const int64_t* origin,
    int64_t draw, int64_t fits, int64_t size, int64_t count) {
  subset_sorted(out, key, origin, draw, fits, size, count);
}
extern "C" __global__ void walked(int64_t* out, const int64_t* key, const int64_t* origin,
    int64_t draw, int64_t fits, int64_t size, int64_t count, int64_t rows, int64_t columns) {
  subset_walked(out, key, origin, draw, fits, size, count, rows, columns);
}"""
    )


FORMS = {"block of 32": (0, 32), "block of 96": (0, 96), "block of 256": (0, 256), "grid": (3, 64)}


@pytest.fixture(scope="module", params=FORMS)
def launch(request, shim, form):
    """``launch(name, *arguments)``: the kernel's team is as wide as it is compiled for."""
    blocks, threads = FORMS[request.param]
    kernels = shim(form(_kernels(), blocks, threads))
    seeds = iter(range(1000))

    def start(name, *arguments):
        kernels.launch(name, max(1, blocks), threads, *arguments, seed=next(seeds))

    return start


@pytest.fixture(scope="module", params=KINDS, ids=KINDS.values())
def dtype(request):
    return request.param


# ---- noise

SHAPES = [
    (1, 1, 1),
    (2, 3, 256),
    (3, 2, 257),
    (1, 200, 7),
    (1, 1, 1024),
    (2, 2, 1281),
    (1, 2, 3001),
]


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_noise_is_that_of_the_reference(launch, dtype, kind):
    key, group = philox.derive_key(3, 1), 512
    origin = philox.make_origin(step=2**31 + 5, particle=7, fit=4)
    moved = philox.make_origin(element=4 * group, step=2**31 + 5, particle=7, fit=4)
    for shape in SHAPES:
        out = torch.full(shape, float("nan"), dtype=dtype)
        few = "few_" if shape[2] <= 256 else ""
        launch(f"{few}{kind}_{KINDS[dtype]}", out, key, origin, group, *shape)
        expected = getattr(philox, kind)(key, moved, *shape, dtype=dtype)
        # Radius and angle are each right to some ulp; near a zero of the cosine the error is
        # absolute. Uniform numbers are rounded once.
        slack = (32 if kind == "normal" else 1) * torch.finfo(dtype).eps
        torch.testing.assert_close(out, expected, rtol=slack, atol=slack)


SIZES = [(1, 1), (10, 10), (256, 100), (257, 257), (1000, 7), (1024, 1024), (99_991, 80)]


def test_subsets_are_those_of_the_reference(launch):
    key, origin = philox.derive_key(5, 2), philox.make_origin(step=3, fit=6)
    moved = philox.make_origin(step=3, particle=2, fit=6)
    for size, count in SIZES:
        out = torch.full((4, count), -1)
        name, more = ("sorted", ()) if size <= 1024 else ("walked", subsample.grid_of(size))
        launch(name, out, key, origin, 2, 4, size, count, *more)
        assert torch.equal(out, subsample.indices(key, moved, 4, 1, size, count)[:, 0]), size


# ---- along an axis

LINES = [(1, 1, 1), (1, 300, 1), (2, 33, 5), (70, 9, 11), (1, 64, 2), (3, 100, 1)]


def test_running_sums_and_products(launch, dtype):
    for shape in LINES:
        x = (torch.rand(shape, dtype=dtype) + 0.5) * torch.randint(0, 2, shape).mul(2).sub(1)
        slack = 8 * shape[1] * torch.finfo(dtype).eps  # roundings of two orders of summation
        for name, function in (("sum", torch.cumsum), ("product", torch.cumprod)):
            out = torch.full_like(x, float("nan"))
            launch(f"{name}_{KINDS[dtype]}", out, x, *shape)
            expected = function(x.double(), 1)
            torch.testing.assert_close(out.double(), expected, rtol=slack, atol=slack)


def test_running_sums_of_integers(launch):
    for shape in LINES:
        whole = torch.randint(-(2**40), 2**40, shape)
        out = torch.zeros_like(whole)
        launch("whole_sum", out, whole, *shape)
        assert torch.equal(out, whole.cumsum(1))


@pytest.mark.parametrize("descending", [False, True])
def test_sorting_keeps_the_order_of_equals(launch, dtype, descending):
    for shape in LINES:
        x = torch.randint(-5, 6, shape).to(dtype)
        x[..., 0][x[..., 0] == 3] = float("nan")
        out, places = torch.zeros_like(x), torch.zeros(shape, dtype=torch.int64)
        launch(f"sort_{KINDS[dtype]}", out, places, x, *shape, int(descending))
        values, expected = x.sort(dim=1, descending=descending, stable=True)
        torch.testing.assert_close(out, values, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(places, expected)


# ---- linear algebra

# Number of matrices and their side: a thread, a warp and a block for each.
MATRICES = [(1, 1), (1, 2), (1, 5), (1, 23), (1, 40), (5, 9), (300, 4)]


def slack_of(n: int, dtype: torch.dtype) -> float:
    """Condition numbers here are below 40, and roundings grow with the side."""
    return 100 * n * torch.finfo(dtype).eps


@pytest.mark.parametrize(("batch", "n"), MATRICES)
def test_cholesky(launch, dtype, batch, n):
    root = torch.randn(batch, n, n, dtype=torch.float64)
    a = root @ root.mT / n + torch.eye(n)
    slack = slack_of(n, dtype)
    for upper in (False, True):
        # The other triangle is not looked at.
        given = (a.triu() if upper else a.tril()).to(dtype).contiguous()
        out = torch.full_like(given, float("nan"))
        launch(f"cholesky_{KINDS[dtype]}", out, given, batch, n, int(upper))
        expected = torch.linalg.cholesky(a, upper=upper)
        torch.testing.assert_close(out.double(), expected, rtol=slack, atol=slack)


def test_what_has_no_root_gives_nan(launch, dtype):
    a = torch.eye(20, dtype=dtype)
    a[7, 7] = -1
    out = torch.zeros_like(a)
    launch(f"cholesky_{KINDS[dtype]}", out, a, 1, 20, 0)
    assert out[7, 7].isnan()
    assert out[19, 7].isnan()
    assert not out[:7].isnan().any()


@pytest.mark.parametrize("sizes", MATRICES)
@pytest.mark.parametrize("columns", [1, 7])
def test_triangular_systems(launch, dtype, sizes, columns):
    batch, n = sizes
    slack = slack_of(n, dtype)
    full = torch.randn(batch, n, n, dtype=torch.float64) / n + torch.eye(n) * 2
    for case in range(8):
        upper, left, unit = bool(case & 1), bool(case & 2), bool(case & 4)
        shape = (batch, n, columns) if left else (batch, columns, n)
        b = torch.randn(shape, dtype=torch.float64)
        out = torch.full(shape, float("nan"), dtype=dtype)
        sizes = (batch, n, columns, int(upper), int(left), int(unit))
        launch(f"triangular_{KINDS[dtype]}", out, full.to(dtype), b.to(dtype), *sizes)
        a = full.triu() if upper else full.tril()
        expected = torch.linalg.solve_triangular(a, b, upper=upper, left=left, unitriangular=unit)
        torch.testing.assert_close(out.double(), expected, rtol=slack, atol=slack)


@pytest.mark.parametrize("sizes", MATRICES)
@pytest.mark.parametrize("columns", [1, 6])
def test_systems_by_lu(launch, dtype, sizes, columns):
    batch, n = sizes
    slack = slack_of(n, dtype)
    # Rows in a turned order: every one of them is exchanged.
    a = (torch.randn(batch, n, n, dtype=torch.float64) / n + torch.eye(n)).flip(1)
    factors = torch.full((batch, n, n), float("nan"), dtype=dtype)
    pivots = torch.zeros(batch, n, dtype=torch.int32)
    launch(f"lu_{KINDS[dtype]}", factors, pivots, a.to(dtype), batch, n)
    expected, rows = torch.linalg.lu_factor(a)
    assert torch.equal(pivots, rows)
    torch.testing.assert_close(factors.double(), expected, rtol=slack, atol=slack)
    b = torch.randn(batch, n, columns, dtype=torch.float64)
    for adjoint in (False, True):
        x = torch.full((batch, n, columns), float("nan"), dtype=dtype)
        sizes = (batch, n, columns, int(adjoint))
        launch(f"lu_solve_{KINDS[dtype]}", x, factors, pivots, b.to(dtype), *sizes)
        solved = torch.linalg.lu_solve(expected, rows, b, adjoint=adjoint)
        torch.testing.assert_close(x.double(), solved, rtol=slack, atol=slack)
