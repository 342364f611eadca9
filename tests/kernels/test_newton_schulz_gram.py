"""Newton-Schulz over the Gram matrix: the same function as the iteration itself, for one factor or applied, and when `auto` takes it."""

import copy

import pytest
import torch

from kernels.dispatch import force
from kernels.newton_schulz import GRAM_STEPS, eager, gram_factor, newton_schulz
from kernels.newton_schulz.reference import newton_schulz as reference
from tests.kernels.support import assert_close, relative_rms

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# A direction whose singular value is 0 grows by 3.4445 a step: by 485 in five, and its square, which the Gram matrix holds, by 2.4e5.
# That is what rounding (6e-8, 1e-16) is amplified by. Measured worst of the cases below: 2.5e-4 in float32, 7.3e-13 in float64.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-11}


def with_spectrum(m: int, n: int, values: torch.Tensor) -> torch.Tensor:
    u, v = (torch.linalg.qr(torch.randn(side, len(values), dtype=torch.float64))[0] for side in (m, n))
    return u @ torch.diag(values.double()) @ v.T


def cases():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {
        "wide": randn(3, 24, 60),
        "tall": randn(2, 60, 24),
        "square": randn(2, 40, 40),
        "stack of stacks": randn(2, 2, 9, 14),
        "one row": randn(1, 30),
        "rank 1": randn(2, 32, 1) @ randn(2, 1, 48),
        "rank 6 of 32": randn(32, 6) @ randn(6, 48),
        "half of the rows zero": torch.cat([randn(12, 48), torch.zeros(12, 48, dtype=torch.float64)]),
        "condition 1e3": with_spectrum(48, 96, torch.logspace(0, -3, 48)),
        "condition 1e6": with_spectrum(96, 48, torch.logspace(0, -6, 48)),
    }


CASES = cases()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_gram_equals_the_reference(name, dtype):
    x = CASES[name]
    got = newton_schulz(x.to(dtype), dtype=dtype, form="gram")
    assert got.dtype == dtype
    assert_close(got, reference(x, 5, COEFFICIENTS, 1e-7), TOLERANCE[dtype], name)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6, 10, 23])
def test_any_number_of_steps(steps):
    x = CASES["wide"]
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-13)):  # measured 4.4e-6 and 4.5e-14
        got = newton_schulz(x.to(dtype), steps=steps, dtype=dtype, form="gram")
        assert_close(got, newton_schulz(x, steps=steps, dtype=torch.float64, form="direct"), tolerance, f"{steps} steps")


def test_many_steps_at_low_rank_stay_bounded():
    """Ten steps raise rounding in the zero directions to order one, in either form; one Gram matrix for all of them overflows instead."""
    x = CASES["rank 1"].float()
    values = torch.linalg.svdvals(newton_schulz(x, steps=20, dtype=torch.float32, form="gram"))
    assert values.max() < 1.25  # as those of the direct form, whose fixed band ends at 1.14
    unit = x / torch.linalg.norm(x, dim=(-2, -1), keepdim=True)
    at_once = eager.gram_factor(unit @ unit.mT, 20, COEFFICIENTS) @ unit
    assert not at_once.abs().max() < 1e3


def test_other_coefficients():
    x, classic = CASES["wide"], (1.5, -0.5, 0.0)
    assert_close(newton_schulz(x, 12, classic, form="gram"), reference(x, 12, classic, 1e-7), 1e-13, "cubic")


@pytest.mark.parametrize("name", CASES)
def test_factor_on_either_side(name):
    x = CASES[name]
    unit = x / torch.linalg.norm(x, dim=(-2, -1), keepdim=True)
    expected = reference(x, 5, COEFFICIENTS, 1e-7)
    for dtype, tolerance in TOLERANCE.items():
        y = unit.to(dtype)
        assert_close(gram_factor(y @ y.mT) @ y, expected, tolerance, "P X")
        assert_close(y @ gram_factor(y.mT @ y), expected, tolerance, "X P")


def test_factor_equals_its_specification_on_the_eigenvalues():
    x = CASES["wide"] / 40
    for steps in range(GRAM_STEPS + 1):
        with force("reference"):
            expected = gram_factor(x @ x.mT, steps)
        assert_close(gram_factor(x @ x.mT, steps), expected, 1e-12, f"{steps} steps")  # measured 4.5e-15


def test_rows_that_are_sharded():
    """Shards add their Gram matrices, as an all-reduce does, and apply the factor to their own rows."""
    x = CASES["tall"][0] / torch.linalg.norm(CASES["tall"][0])
    shards = [x[:7], x[7:32], x[32:]]
    factor = gram_factor(sum(shard.T @ shard for shard in shards))
    assert_close(torch.cat([shard @ factor for shard in shards]), reference(x, 5, COEFFICIENTS, 1e-7), 1e-12, "sharded")


@pytest.mark.parametrize("form", ["direct", "gram", "auto"])
def test_result_does_not_depend_on_the_company(form):
    x = torch.stack([CASES["rank 6 of 32"], torch.randn(32, 48, dtype=torch.float64), torch.zeros(32, 48, dtype=torch.float64)]).float()
    together = newton_schulz(x, dtype=torch.float32, form=form)
    for matrix, got in zip(x[:2], together):
        assert relative_rms(got, newton_schulz(matrix, dtype=torch.float32, form=form)) < 1e-6
    assert torch.equal(together[2], x[2])


@pytest.fixture(autouse=True)
def full_precision():
    """Other tests' training turns on TF32, which is the process's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_auto_is_direct_unless_the_long_side_is_longer_by_half():
    for shape, form in [((2, 32, 48), "direct"), ((2, 32, 49), "gram"), ((70, 32), "gram"), ((32, 32), "direct")]:
        x = torch.randn(shape)
        for dtype in (torch.float32, torch.float64):
            auto, direct, gram = (newton_schulz(x, dtype=dtype, form=f) for f in ("auto", "direct", "gram"))
            assert torch.equal(auto, {"direct": direct, "gram": gram}[form])
            if dtype == torch.float32:
                assert not torch.equal(direct, gram)  # else the line above compares nothing
        assert torch.equal(newton_schulz(x, dtype=torch.bfloat16), newton_schulz(x, dtype=torch.bfloat16, form="direct"))


def test_auto_is_direct_where_float32_products_may_be_narrower():
    x = torch.randn(16, 64)
    full = {form: newton_schulz(x, dtype=torch.float32, form=form) for form in ("auto", "direct", "gram")}
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        narrow = newton_schulz(x, dtype=torch.float32)
        direct = newton_schulz(x, dtype=torch.float32, form="direct")
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(full["auto"], full["gram"]) and not torch.equal(full["auto"], full["direct"])
    assert torch.equal(narrow, direct)


@pytest.mark.slow
def test_auto_traces_into_one_graph_and_keeps_its_guard():
    x = torch.randn(16, 64)
    call = lambda x: newton_schulz(x, dtype=torch.float32)  # noqa: E731
    expected, direct = call(x), newton_schulz(x, dtype=torch.float32, form="direct")
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected) and not torch.equal(expected, direct)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert torch.equal(compiled(x), direct)
    finally:
        torch.set_float32_matmul_precision(before)


def test_autocast_does_not_reach_the_factor():
    gram = CASES["wide"].float() @ CASES["wide"].float().mT / 2000
    with torch.autocast("cpu", torch.bfloat16):
        inside = gram_factor(gram)
    assert torch.equal(inside, gram_factor(gram))


def test_inputs_are_not_written():
    x = CASES["wide"] / 40
    gram = x @ x.mT
    before = copy.deepcopy((x, gram))
    newton_schulz(x, form="gram"), gram_factor(gram)
    assert torch.equal(x, before[0]) and torch.equal(gram, before[1])


def test_nothing_to_do():
    assert newton_schulz(torch.zeros(0, 4, 8), dtype=torch.float32, form="gram").shape == (0, 4, 8)
    assert gram_factor(torch.zeros(0, 4, 4)).shape == (0, 4, 4)
    assert torch.equal(gram_factor(torch.zeros(2, 3, 3), steps=0), torch.eye(3).expand(2, 3, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_arithmetic_is_refused(dtype):
    with pytest.raises(ValueError, match=f"form=gram in {dtype} loses orthogonality"):
        newton_schulz(torch.randn(4, 9), dtype=dtype, form="gram")


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="form is 'grams'; allowed are auto, direct, gram"):
        newton_schulz(torch.eye(2), form="grams")
    for gram in (torch.zeros(3), torch.zeros(2, 3), torch.zeros(3, 3, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="gram_factor: gram is"):
            gram_factor(gram)
    for steps in (-1, GRAM_STEPS + 1):
        with pytest.raises(ValueError, match=f"gram_factor: steps={steps}"):
            gram_factor(torch.eye(2), steps)
