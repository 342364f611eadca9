"""The compiled selective scan: against the float64 loop, its documents, its threads, and machines that cannot compile it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kernels import compile_c, dispatch
from kernels.selective_scan import cpu, eager, reference, selective_scan, selective_state_update
from tests.kernels.support import assert_close, compare, gradients
from tests.kernels.test_selective_scan import make, with_softplus

# 16 channels a vector, 16 steps a chunk, 8 states a block, 128 channels a work item: below, at, above each of them
SHAPES = [(2, 37, 6, 4), (1, 1, 5, 3), (2, 16, 16, 8), (1, 17, 33, 16), (2, 33, 130, 17), (3, 48, 128, 16), (1, 40, 20, 3)]


@pytest.mark.parametrize("dt_range", [(1e-4, 1e-3), (1e-3, 0.1), (0.5, 5.0)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_float64_loop(shape, dt_range):
    inputs, cotangents = make(*shape, dtype=torch.float32, dt_range=dt_range, a_max=64.0)
    start = torch.rand(shape[:2]) < 0.1
    for mask in (None, start):
        expected = gradients(with_softplus(reference.selective_scan, mask), {k: v.double() for k, v in inputs.items()}, cotangents)
        compare(gradients(with_softplus(cpu.selective_scan, mask), inputs, cotangents), expected, 1e-5)  # measured: at most 5e-6


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_bfloat16_activations(shape):
    """Against the float64 loop on the same rounded inputs: what is left is the rounding of the outputs."""
    inputs, cotangents = make(*shape, dtype=torch.float32)
    rounded = {k: v.bfloat16() if k in ("u", "dt", "z", "B", "C") else v for k, v in inputs.items()}
    cotangents[0] = cotangents[0].bfloat16().double()
    expected = gradients(with_softplus(reference.selective_scan), {k: v.double() for k, v in rounded.items()}, cotangents)
    actual = gradients(with_softplus(cpu.selective_scan), rounded, cotangents)
    assert actual["out0"].dtype == actual["d_z"].dtype == torch.bfloat16
    compare(actual, expected, 4e-3)  # bf16 keeps 8 bits: 1.7e-3 relative RMS, measured 2.2e-3


def test_strided_inputs():
    """z is half of a projection and B and C are slices of one, as the model gives them."""
    inputs, cotangents = make(2, 20, 24, 16, dtype=torch.float32)
    expected = gradients(with_softplus(cpu.selective_scan), inputs, cotangents)
    wide = torch.cat([inputs["u"], inputs["z"]], dim=2)
    small = torch.cat([inputs["B"], inputs["C"]], dim=2)
    views = inputs | {"u": wide[:, :, :24], "z": wide[:, :, 24:], "B": small[:, :, :16], "C": small[:, :, 16:]}
    views["dt"] = inputs["dt"].transpose(0, 1).contiguous().transpose(0, 1)
    compare(gradients(with_softplus(cpu.selective_scan), views, cotangents), expected, 0.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", [cpu, eager, reference], ids=["cpu", "eager", "reference"])
@torch.no_grad()
def test_a_state_updated_in_place_is_the_one_that_the_scan_returns(shape, backend):
    inputs, _ = make(*shape, dtype=torch.float32)
    y, final = backend.selective_scan(**inputs, dt_softplus=True)
    state = inputs.pop("initial_state").contiguous()
    place = state.data_ptr()
    with dispatch.force(backend.__name__.rsplit(".")[-1]):
        assert torch.equal(selective_state_update(state, **inputs, dt_softplus=True), y)
    assert torch.equal(state, final) and state.data_ptr() == place


def test_a_state_is_not_updated_under_gradients():
    inputs, _ = make(1, 3, 4, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match="selective_state_update: gradients are recorded; call selective_scan"):
        selective_state_update(inputs.pop("initial_state"), **inputs)


@pytest.mark.parametrize("left_out", ["D", "z", "dt_bias", "initial_state"])
def test_optional_arguments(left_out):
    inputs, cotangents = make(length=19, dtype=torch.float32)
    del inputs[left_out]
    doubled = {k: v.double() for k, v in inputs.items()}
    compare(
        gradients(with_softplus(cpu.selective_scan), inputs, cotangents),
        gradients(with_softplus(reference.selective_scan), doubled, cotangents),
        1e-5,
    )


def test_without_softplus_and_with_growing_states():
    inputs, cotangents = make(length=9, dtype=torch.float32)
    inputs["dt"], inputs["A"] = inputs["dt"].abs() * 0.01, -inputs["A"]
    doubled = {k: v.double() for k, v in inputs.items()}
    compare(gradients(cpu.selective_scan, inputs, cotangents), gradients(reference.selective_scan, doubled, cotangents), 1e-5)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("first", [1, 15, 16, 17, 19])
def test_infinity_and_nan_stay_in_their_document(bad, first):
    inputs, cotangents = make(length=20, dtype=torch.float32)
    inputs["u"][0, first - 1] = bad
    start = torch.zeros(2, 20, dtype=torch.bool)
    start[0, first] = True
    cotangents[0][0, :first] = 0
    expected = gradients(with_softplus(eager.selective_scan, start), inputs, cotangents)
    actual = gradients(with_softplus(cpu.selective_scan, start), inputs, cotangents)
    for name in ("out0", "d_u", "d_dt", "d_B", "d_C", "d_z"):
        assert actual[name][0, first:].isfinite().all(), name
        assert_close(actual[name][0, first:], expected[name][0, first:], 1e-5, name)
    assert_close(actual["out1"], expected["out1"], 1e-5, "state")


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_of_a_document_do_not_reach_the_one_before(bad):
    inputs, cotangents = make(length=21, dtype=torch.float32)
    start = torch.zeros(2, 21, dtype=torch.bool)
    start[:, 17] = True
    cotangents[0][:, 19] = bad
    expected = gradients(with_softplus(eager.selective_scan, start), inputs, cotangents)
    actual = gradients(with_softplus(cpu.selective_scan, start), inputs, cotangents)
    for name in ("d_u", "d_dt", "d_B", "d_C", "d_z"):
        assert actual[name][:, :17].isfinite().all(), name
        assert_close(actual[name][:, :17], expected[name][:, :17], 1e-5, name)


def test_nan_is_not_hidden():
    inputs, _ = make(length=5, dtype=torch.float32)
    for name in ("u", "dt", "A", "B", "C", "z", "initial_state"):
        spoiled = {k: v.clone() for k, v in inputs.items()}
        spoiled[name].view(-1)[0] = float("nan")
        assert cpu.selective_scan(**spoiled, dt_softplus=True)[0].isnan().any(), name


def test_bits_do_not_depend_on_threads():
    inputs, cotangents = make(2, 50, 300, 16, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(with_softplus(cpu.selective_scan), inputs, cotangents))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        compare(result, results[0], 0.0)


def test_many_threads_call_it_at_once():
    inputs, cotangents = make(2, 40, 40, 16, dtype=torch.float32)
    expected = gradients(with_softplus(cpu.selective_scan), inputs, cotangents)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: gradients(with_softplus(cpu.selective_scan), inputs, cotangents), range(12)):
            compare(result, expected, 0.0)


def test_step_without_gradient_equals_the_row():
    inputs, _ = make(2, 6, 20, 16, dtype=torch.float32)
    with torch.no_grad():
        whole, last = selective_scan(**inputs, dt_softplus=True)
        state, rows = inputs["initial_state"], []
        for t in range(6):
            step = {k: v[:, t : t + 1] if k in ("u", "dt", "B", "C", "z") else v for k, v in inputs.items()}
            y, state = selective_scan(**step | {"initial_state": state}, dt_softplus=True)
            rows.append(y)
    compare({"y": torch.cat(rows, dim=1), "state": state}, {"y": whole, "state": last}, 1e-6)


def test_float64_and_many_states_run_in_eager():
    for shape, dtype in (((1, 3, 2, 2), torch.float64), ((1, 3, 2, 300), torch.float32)):
        inputs, cotangents = make(*shape, dtype=dtype)
        compare(
            gradients(with_softplus(cpu.selective_scan), inputs, cotangents),
            gradients(with_softplus(eager.selective_scan), inputs, cotangents),
            0.0,
        )


# ---------------------------------------------------------------------------------------------------------------- compiling

RUN = "import torch; from kernels.selective_scan import selective_scan as s; x = torch.ones(1, 2, 1); print(s(x, x, -x[0, :1], x, x))"


def python(**environment):
    return subprocess.run([sys.executable, "-c", RUN], env={**os.environ, **environment}, capture_output=True, text=True)


def test_without_a_compiler_torch_runs_and_says_so(tmp_path):
    done = python(CC="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0 and "tensor" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "kernels.selective_scan on cpu: backend cpu" in line and "no C compiler" in line and "a slower one runs" in line


def test_the_compiler_may_come_with_flags_or_not_at_all(monkeypatch):
    monkeypatch.setenv("CC", "gcc -O2")
    assert compile_c.compiler()[1:] == ["-O2"]
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ImportError, match="no C compiler: install gcc"):
        compile_c.compiler()


def test_a_user_without_a_home_compiles_all_the_same(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(compile_c.Path, "home", no_home)
    folder = compile_c.cache_folder()
    assert folder.is_dir()
    folder.rmdir()


@pytest.mark.parametrize(
    ("name", "change"), [("B", lambda t: t.to("meta")), ("dt", lambda t: t.to(torch.complex64)), ("z", lambda t: t.long())]
)
def test_tensors_that_the_kernel_cannot_read_are_refused(name, change):
    inputs, _ = make(1, 3, 4, 2, dtype=torch.float32)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=rf"selective_scan: {name} is torch\.\w+ on \w+; expected floating point on cpu"):
        selective_scan(**inputs, dt_softplus=True)


def test_compiled_once_and_kept(tmp_path):
    first = python(XDG_CACHE_HOME=str(tmp_path))
    assert first.returncode == 0 and first.stderr == ""
    (file,) = (tmp_path / "patchbay").iterdir()
    made = file.stat().st_mtime_ns
    assert python(XDG_CACHE_HOME=str(tmp_path)).returncode == 0
    assert [f.stat().st_mtime_ns for f in (tmp_path / "patchbay").iterdir()] == [made]


def test_a_broken_source_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.c"
    source.write_text("int f( {")
    with pytest.raises(ImportError, match=r"cannot build broken\.c: .*error") as raised:
        compile_c.load_library(source)
    assert "\n" not in str(raised.value)


def test_a_cache_that_cannot_be_written_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = compile_c.cache_folder()
    assert folder.is_dir() and tmp_path not in folder.parents
    folder.rmdir()


def test_dispatch_picks_it_on_the_cpu_without_a_warning(monkeypatch):
    monkeypatch.setattr(dispatch, "_picked", {})  # as in a new process
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.pick("selective_scan", "cpu") is cpu
