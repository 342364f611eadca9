"""Orthonormal bases: both methods against Householder QR in float64, and that what Cholesky cannot do is noticed and done again."""

import pytest
import torch

from kernels.dispatch import available
from kernels.orthonormal import eager, orthonormal
from kernels.orthonormal.reference import orthonormal as reference

ORTHONORMAL = {torch.float32: 1e-6, torch.float64: 1e-13}  # measured: 5.5e-7 (768 x 64), 1.2e-15
EPS = {dtype: torch.finfo(dtype).eps for dtype in ORTHONORMAL}
DTYPES = pytest.mark.parametrize("dtype", list(ORTHONORMAL), ids=["fp32", "fp64"])
METHODS = pytest.mark.parametrize("method", ["qr", "cholesky"])


def defect(q):
    q = q.double()
    return float((q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype)).abs().amax())


def distance(q, expected):
    """Largest norm of a difference of two bases, signs of columns apart: small only if the first k columns span the same, for every k."""
    q, expected = q.double(), expected.double()
    signs = (q * expected).sum(-2, keepdim=True).sign()
    return float(torch.linalg.norm(q * signs - expected, dim=(-2, -1)).max())


def of_condition(n, r, condition, dtype=torch.float64, batch=3):
    u, v = (torch.linalg.qr(torch.randn(batch, side, r, dtype=torch.float64))[0] for side in (n, r))
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), r, dtype=torch.float64)
    return (u * values @ v.mT).to(dtype)


@METHODS
@DTYPES
@pytest.mark.parametrize("shape", [(3, 40, 7), (2, 2, 33, 16), (160, 64), (4, 24, 24), (2, 9, 1), (1, 1)], ids=str)
def test_orthonormal_and_in_the_order_of_the_columns(shape, dtype, method):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    q = orthonormal(x, method)
    assert q.shape == x.shape and q.dtype == dtype and defect(q) < ORTHONORMAL[dtype]
    condition = float(torch.linalg.cond(x.double()).max())
    assert distance(q, reference(x.double(), method)) < 30 * EPS[dtype] * condition  # measured at most 7.7


@METHODS
@DTYPES
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_ill_conditioned(condition, dtype, method):
    x = of_condition(96, 16, condition, dtype)
    q = orthonormal(x, method)
    assert defect(q) < ORTHONORMAL[dtype]
    assert distance(q, reference(x.double(), method)) < 10 * EPS[dtype] * condition  # measured at most 0.9


def test_what_cholesky_cannot_do_is_done_again(monkeypatch):
    x = of_condition(96, 16, 1e6, torch.float32)
    plain, good = eager.cholesky_qr2(x)
    assert not good.any() and all(not defect(q) < 0.1 for q in plain)
    redone = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda a: redone.append(a.shape) or qr(a))
    x[1] = torch.randn(96, 16)
    assert eager.cholesky_qr2(x)[1].tolist() == [False, True, False]
    assert defect(orthonormal(x, "cholesky")) < ORTHONORMAL[torch.float32]
    assert redone == [(2, 96, 16)]


def test_a_condition_that_the_second_round_mends():
    x = of_condition(96, 16, 1e3, torch.float32)  # 1e4 is where it may fail
    q, good = eager.cholesky_qr2(x)
    assert good.all() and defect(q) < ORTHONORMAL[torch.float32]


# columns over 65 orders of magnitude, all of them too small or too large to square, and unlike sizes of dependent columns
@pytest.mark.parametrize("scale", [(-33, 32), (-25, -25), (25, 25), (0, -8)], ids=str)
def test_the_size_of_a_column_does_not_matter(scale, monkeypatch):
    x = of_condition(96, 16, 1e3, batch=2).mul(torch.logspace(*scale, 16, dtype=torch.float64)).float()
    q, good = eager.cholesky_qr2(x)
    assert good.all() and defect(q) < ORTHONORMAL[torch.float32]
    assert distance(q, reference(x.double(), "qr")) < 10 * EPS[torch.float32] * 1e3
    monkeypatch.setattr(eager, "unit_columns", lambda x: x)
    assert not eager.cholesky_qr2(x)[1].any()  # the scaling is what does it


@METHODS
@DTYPES
def test_dependent_and_zero_columns(dtype, method):
    full = torch.randn(30, 5, dtype=dtype)
    cases = {
        "twice": torch.cat([full, full], dim=1),
        "low rank": full @ torch.randn(5, 12, dtype=dtype),
        "zero column": torch.cat([full, torch.zeros(30, 1, dtype=dtype), torch.randn(30, 2, dtype=dtype)], dim=1),
        "zero": torch.zeros(30, 6, dtype=dtype),
    }
    for name, x in cases.items():
        q = orthonormal(x, method)
        assert defect(q) < ORTHONORMAL[dtype], name
        inside = min(5, x.shape[1]) if name != "zero" else 0
        left_out = x - q[:, :inside] @ (q[:, :inside].mT @ x)
        if name in ("twice", "low rank"):  # the first five columns of Q span all of x
            assert float(left_out.norm() / x.norm()) < 10 * EPS[dtype] * float(torch.linalg.cond(x[:, :5].double())), name
        if name == "zero column":  # and the columns after the arbitrary one still belong to x
            rest = x - q @ (q.mT @ x)
            assert float(rest.abs().max()) < 100 * EPS[dtype], name


@METHODS
def test_result_does_not_depend_on_the_company(method):
    x = torch.randn(5, 40, 8)
    x[1], x[3] = 0, float("nan")
    x[4] = x[4] @ torch.diag(torch.logspace(0, -9, 8)) @ torch.randn(8, 8)  # falls back
    together = orthonormal(x, method)
    for i in (0, 1, 2):
        assert float((together[i] - orthonormal(x[i], method)).abs().max()) < 1e-6
    assert torch.equal(together[4], orthonormal(x[4], "qr"))
    assert together[3].isnan().any() and together[[0, 1, 2, 4]].isfinite().all()


def test_auto_is_qr_on_the_cpu_and_strides_do_not_matter():
    x = torch.randn(8, 40, 3).permute(2, 1, 0)
    before = x.clone()
    assert torch.equal(orthonormal(x), torch.linalg.qr(x)[0]) and torch.equal(orthonormal(x), orthonormal(x, "qr"))
    assert float((orthonormal(x, "cholesky") - orthonormal(x.contiguous(), "cholesky")).abs().max()) < 1e-6
    assert torch.equal(x, before)


def test_process_wide_precision_and_autocast_do_not_reach_inside():
    x = torch.randn(2, 40, 8)
    expected = orthonormal(x, "cholesky")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            got = orthonormal(x, "cholesky")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got, expected)


@pytest.mark.slow
def test_a_compiled_caller():
    def caller(x, method):
        return orthonormal(x * 2, method) + 1

    compiled = torch.compile(caller, backend="eager")
    x = torch.stack([torch.randn(20, 4), torch.zeros(20, 4)])  # the second falls back
    for method in ("qr", "cholesky"):
        assert torch.equal(compiled(x, method), caller(x, method))


@METHODS
@pytest.mark.parametrize("shape", [(0, 4, 2), (3, 4, 0), (0, 0)], ids=str)
def test_nothing_to_do(shape, method):
    assert orthonormal(torch.zeros(shape), method).shape == shape


def test_backends():
    assert available("orthonormal") == ["eager", "reference"]


@pytest.mark.parametrize(
    ("x", "method", "words"),
    [
        (torch.zeros(3), "auto", r"orthonormal: x is torch.float32 of shape \(3,\)"),
        (torch.zeros(2, 3), "auto", r"of shape \(2, 3\); it needs float32 or float64 \(..., n, r\) with r <= n"),
        (torch.zeros(3, 2, dtype=torch.bfloat16), "auto", "orthonormal: x is torch.bfloat16"),
        (torch.zeros(3, 2), "svd", "method is 'svd'; allowed are auto, qr, cholesky"),
    ],
)
def test_bad_arguments_are_refused(x, method, words):
    with pytest.raises(ValueError, match=words):
        orthonormal(x, method)
