"""The mathematics of generated CUDA, and its reductions, against float64."""

from __future__ import annotations

import pytest
import torch
from scipy import special
from torch.nn import functional

from fastsvi.engine.cuda.prelude import prelude_for
from fastsvi.engine.loops.pointwise import BINARY, LOGISTIC, TESTS, UNARY

TYPES = {torch.float32: "float", torch.float64: "double"}
ALL = list(TYPES)


def everywhere(dtype: torch.dtype) -> torch.Tensor:
    tiny = torch.finfo(dtype).tiny
    ends = [0.0, -0.0, 1.0, -1.0, tiny, tiny / 64, 1e30, -1e30, float("inf"), -float("inf")]
    return torch.cat(
        [
            torch.tensor([*ends, float("nan")], dtype=dtype),
            torch.linspace(-110, 110, 801, dtype=dtype),
            torch.linspace(-3, 3, 801, dtype=dtype),
            torch.logspace(-37, 37, 301, dtype=dtype),
            -torch.logspace(-37, 37, 301, dtype=dtype),
        ]
    )


REFERENCES = {
    "rsqrt": torch.rsqrt,
    "erfinv": torch.erfinv,
    "round": torch.round,
    "exp_neg_abs": lambda x: (-x.abs()).exp(),
    "sigmoid": torch.sigmoid,
    "sigmoid_neg": lambda x: torch.sigmoid(-x),
    "softplus": lambda x: functional.softplus(x, threshold=50),
    "softplus_below": lambda x: (-x.abs()).exp().log1p(),
    # torch's own is right to 1e-9.
    "trigamma": lambda x: torch.from_numpy(special.polygamma(1, x.numpy())),
}
# Ulp that CUDA's own functions need are its affair: these bound what is ours, and that the right
# function is called. lgamma and digamma have zeros, near which only the absolute error is small;
# trigonometric functions of large numbers and poles at negative integers are left out.
SLACK = {"lgamma": 100, "digamma": 100, "trigamma": 100}
BOUNDED = {"sin", "cos", "tan", "lgamma", "digamma", "trigamma", "frac"}


@pytest.mark.parametrize("dtype", ALL)
def test_scalar_functions_are_right_to_some_ulp_everywhere(shim, block_form, dtype):
    kind = TYPES[dtype]
    templates = {name: text for name, (text, _) in (UNARY | LOGISTIC).items()}
    templates["trigamma"] = "fn::trigamma({0})"
    x = everywhere(dtype)
    writes = "\n".join(
        f"out[{k} * n + i] = {text.format('x', 'below')};"
        for k, text in enumerate(templates.values())
    )
    kernels = shim(
        block_form(
            f"""extern "C" __global__ void all({kind}* out, const {kind}* from, int64_t n) {{
            EACH(i, n) {{
              const {kind} x = from[i], below = fn::exp_minus(-fn::abs(x));
              {writes}
            }}
            }}"""
        )
    )
    got = torch.zeros(len(templates), len(x), dtype=dtype)
    kernels.launch("all", 1, 64, got, x, len(x))
    info = torch.finfo(dtype)
    for name, row in zip(templates, got, strict=True):
        fair = torch.ones_like(x, dtype=torch.bool)
        if name in BOUNDED:
            fair = (x > -0.5) & (x.abs() < 1e6) & (x.abs() > 1e-30)
        function = REFERENCES.get(name) or getattr(torch, name)
        wide = function(x[fair].double())
        wide = torch.where(wide.abs() > info.max, wide.sign() * torch.inf, wide)
        slack = SLACK.get(name, 8)
        torch.testing.assert_close(
            row[fair].double(),
            wide,
            rtol=slack * info.eps,
            atol=max(4 * info.tiny * info.eps, info.eps * slack * (name in SLACK)),
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("dtype", ALL)
def test_functions_of_two_numbers_and_tests(shim, block_form, dtype):
    kind, info = TYPES[dtype], torch.finfo(dtype)
    names = [name for name in BINARY if name != "bitwise_xor"]
    templates = [BINARY[name][0] for name in names] + [text for text, _ in TESTS.values()]
    writes = "\n".join(
        f"out[{k} * n + i] = {text.format('x[i]', 'y[i]')};" for k, text in enumerate(templates)
    )
    head = (
        f'extern "C" __global__ void all({kind}* out, const {kind}* x, const {kind}* y, int64_t n)'
    )
    kernels = shim(block_form(f"{head} {{ EACH(i, n) {{ {writes} }} }}"))
    ends = [0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan")]
    values = torch.cat([torch.tensor(ends), torch.linspace(-7.3, 7.1, 40)]).to(dtype)
    x, y = (part.contiguous().view(-1) for part in torch.meshgrid(values, values, indexing="ij"))
    got = torch.zeros(len(templates), len(x), dtype=dtype)
    kernels.launch("all", 1, 64, got, x, y, len(x))
    own = {"special_xlog1py": torch.special.xlog1py}
    for name, row in zip([*names, *TESTS], got, strict=True):
        function = own.get(name) or getattr(torch, name)
        expected = (function(x) if name in TESTS else function(x, y)).to(dtype)
        fair = torch.ones_like(x, dtype=torch.bool)
        if name == "floor_divide":  # of what is finite; a division by 0 is none
            fair = x.isfinite() & y.isfinite() & (y != 0) & ((x / y).frac().abs() > 1e-5)
        if name == "remainder":  # by an infinity: torch's differs from C's fmod
            fair = y.isfinite()
        if name == "hypot":
            fair = ~x.isinf() & ~y.isinf()
        torch.testing.assert_close(
            row[fair],
            expected[fair],
            rtol=8 * info.eps,
            atol=8 * info.eps,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_comparisons_and_integers(shim, block_form):
    kernels = shim(
        block_form(
            """extern "C" __global__ void all(float* f, int64_t* i, const float* x) {
            const float nan = x[0];
            if (RANK != 0) return;
            f[0] = fn::larger(nan, 1.0f), f[1] = fn::larger(1.0f, nan);
            f[2] = fn::smaller(nan, 1.0f), f[3] = fn::smaller(2.0f, 1.0f);
            f[4] = fn::larger(-INFINITY, 1.0f), f[5] = fn::remainder(-5.5f, 2.0f);
            f[6] = fn::remainder(5.5f, -2.0f), f[7] = fn::copysign(3.0f, -0.0f);
            f[8] = NAN, f[9] = fn::floor(-1.5f), f[10] = fn::pow(2.0f, 3.0f);
            i[0] = fn::divide_down(-7, 2), i[1] = fn::remainder((int64_t)-7, (int64_t)3);
            i[2] = fn::remainder((int32_t)7, (int32_t)-3), i[3] = fn::abs((int64_t)-9);
            i[4] = fn::clamped(12, 7), i[5] = fn::clamped(-3, 7), i[6] = fn::least(3, 5);
            i[7] = INT64_MIN, i[8] = fn::floor((int64_t)4), i[9] = fn::larger(true, false);
            i[10] = INT64_C(1234567890123);
            }"""
        )
    )
    floats, whole = torch.zeros(11), torch.zeros(11, dtype=torch.int64)
    kernels.launch("all", 1, 64, floats, whole, torch.tensor([float("nan")]))
    nan = float("nan")
    expected = torch.tensor([nan, nan, nan, 1, 1, 0.5, -0.5, -3, nan, -2, 8])
    torch.testing.assert_close(floats, expected, rtol=0, atol=0, equal_nan=True)
    assert whole.tolist() == [-4, 2, -2, 9, 7, 0, 3, -(2**63), 4, 1, 1234567890123]


# ---- reductions

REDUCED = {
    "float": torch.float32,
    "double": torch.float64,
    "int64_t": torch.int64,
    "int32_t": torch.int32,
    "int16_t": torch.int16,
    "int8_t": torch.int8,
    "uint8_t": torch.uint8,
    "bool": torch.bool,
}
COMBINED = {"larger": torch.amax, "smaller": torch.amin, "sum": torch.sum, "product": torch.prod}


def test_reductions_over_lanes(shim, block_form):
    bodies = []
    for k, kind in enumerate(REDUCED):
        bodies.append(f"{{ auto* out = ({kind}*)to[{k}];")
        bodies.append(f"const {kind} mine = (({kind}*)from[{k}])[RANK];")
        for j, name in enumerate(COMBINED):
            bodies.append(f"out[RANK + {2 * j} * THREADS] = fn::lanes_{name}<8>(mine);")
            bodies.append(f"out[RANK + {2 * j + 1} * THREADS] = fn::lanes_{name}<32>(mine);")
        bodies.append("}")
    head = 'extern "C" __global__ void all(void* const* from, void* const* to)'
    kernels = shim(block_form("\n".join([head, "{", *bodies, "}"])))
    given = [torch.randint(0, 2, (64,)).to(dtype) for dtype in REDUCED.values()]
    for x in given[:4]:
        x += torch.randint(-4, 4, (64,))
    given[0][3] = given[1][3] = torch.nan  # which wins
    got = [torch.zeros(8, 64, dtype=x.dtype) for x in given]
    kernels.launch("all", 1, 64, given, got)
    for x, rows in zip(given, got, strict=True):
        wide = x.double() if x.is_floating_point() else x.long()
        for j, function in enumerate(COMBINED.values()):
            for width, row in zip((8, 32), rows[2 * j : 2 * j + 2], strict=True):
                lines = wide.view(-1, width)
                expected = function(lines, 1).repeat_interleave(width).to(x.dtype)
                torch.testing.assert_close(row, expected, equal_nan=True)


@pytest.mark.parametrize("blocks", [0, 3])
def test_fill_and_copy(shim, form, blocks):
    kernels = shim(
        form(
            """extern "C" __global__ void all(float* a, int64_t* b, const int64_t* c, int64_t n) {
            fn::fill(a, n, (float)-INFINITY);
            fn::copy(c, n, b);
            }""",
            blocks,
        )
    )
    c = torch.arange(1000)
    a, b = torch.zeros(1001), torch.zeros(1001, dtype=torch.int64)
    kernels.launch("all", max(1, blocks), 64, a, b, c, 1000)
    assert torch.equal(b, torch.cat([c, torch.zeros(1, dtype=torch.int64)]))
    assert (a[:1000] == -float("inf")).all()
    assert a[1000] == 0


def test_only_what_is_used_is_there():
    assert "philox" not in prelude_for("a = b;")
    assert "linear_lu" in prelude_for("linear_lu(a, b, c, 1, 3);")
    assert "philox" in prelude_for("x = fn::normal_at<float, 0>(a, b, 0, 0, 0, 0);")
    assert "subset_hash" in prelude_for("subset_sorted(a, b, c, 0, 1, 3, 2);")
