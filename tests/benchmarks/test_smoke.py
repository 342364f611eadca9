"""Every benchmark runs at tiny shapes, compares its sides, and writes nothing then."""

import dataclasses
import sys

import pytest
import torch

from benchmarks import attention, cases, common, decode, gpu, plots, question_diversity, selective_scan, train_samba


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """Where rows and pictures would go."""
    for module in (common, attention, selective_scan):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.parametrize("module", [attention, selective_scan, train_samba], ids=lambda m: m.__name__)
def test_a_benchmark_runs_and_writes_nothing(module, results, capsys):
    pytest.importorskip("transformers")
    module.main(["--smoke"])
    assert "e-0" in capsys.readouterr().out  # the difference between the sides, of floating-point size
    assert not results.exists()


def test_the_diversity_of_each_level_is_a_row(results, capsys):
    question_diversity.main(["--smoke"])
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [[level, n] for level in "123" for n in ("32", "64")]
    assert not results.exists()


def test_the_mended_model_scans_with_the_mended_loop(monkeypatch):
    pytest.importorskip("transformers")
    from benchmarks import mamba_block

    calls = []
    monkeypatch.setattr(
        mamba_block, "unbound_scan", lambda *args, scan=mamba_block.unbound_scan, **kw: calls.append(1) or scan(*args, **kw)
    )
    twin = train_samba.with_their_mixers(train_samba.model_of(["mamba", "attention"], "test", torch.device("cpu")))
    train_samba.loss_of(twin, train_samba.noise_batch(twin, 1, 5, torch.device("cpu")), torch.float32)
    assert len(calls) == 1  # one Mamba layer of two


def test_a_scan_that_is_wrong_is_not_timed(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(
        selective_scan, "unbound_scan", lambda u, *args, **kw: u * sum(a.mean() for a in (*args, *kw.values()) if hasattr(a, "mean"))
    )
    with pytest.raises(SystemExit, match="nothing was timed"):
        selective_scan.main(["--smoke"])


def test_interleaved_stops_after_its_limit():
    ran = []
    seconds = common.interleaved({"a": lambda: ran.append(1)}, {"a": 50}, warmup=0, clock=lambda run: run() or 1.0, limit_seconds=0.0)
    assert seconds == {"a": [1.0, 1.0, 1.0]} and len(ran) == 3


@pytest.mark.parametrize("interpret", ["0", pytest.param("1", marks=[pytest.mark.slow, pytest.mark.interpret])])
def test_every_gpu_section_runs_on_the_cpu(interpret, results, capsys, monkeypatch):
    if interpret == "1":
        pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", interpret)  # conftest.py has set it; "0" makes gpu.py choose eager
    assert gpu.main(["--smoke"]) == 0
    out = capsys.readouterr().out
    assert all(f"] {name}\n" in out for name in gpu.SECTIONS)
    assert not results.exists()


def test_a_section_that_fails_is_recorded_and_the_others_go_on(monkeypatch):
    def broken(plan):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(gpu.SECTIONS, "scan", broken)
    found = {}
    failures = gpu.run(gpu.smoke_plan("eager"), ["scan", "prompt"], 60.0, found)
    assert failures == ["scan: RuntimeError: out of memory"]
    assert found["scan"]["error"] == "RuntimeError: out of memory" and found["prompt"]["ratio"] > 0
    assert gpu.main(["--smoke", "--sections", "scan"]) == 1  # the broken one again


def test_a_wrong_kernel_fails_correctness(monkeypatch):
    real = cases.swiglu_case

    def wrong(*args):
        case = real(*args)
        scale = lambda m, x: (m.swiglu(x["gate"], x["up"]) * (1.0 if "reference" in m.__name__ else 1.02),)  # noqa: E731
        return cases.Case(case.name, case.op, case.inputs, case.learned, scale)

    monkeypatch.setattr(cases, "swiglu_case", wrong)
    found = {}
    failures = gpu.run(gpu.smoke_plan("eager"), ["correctness"], 60.0, found)
    assert len(failures) == 1 and "swiglu" in failures[0] and "allowed is 1e-02" in failures[0]


def test_sections_after_the_budget_are_skipped():
    found = {}
    assert gpu.run(gpu.smoke_plan("eager"), ["scan"], -1.0, found) == []
    assert "skipped" in found["scan"]


def test_a_late_section_times_less_long(monkeypatch):
    limits = []
    monkeypatch.setitem(gpu.SECTIONS, "scan", lambda plan: limits.append(plan.limit_seconds) or {})
    plan = gpu.smoke_plan("eager")
    for budget in (1e6, 0.5):
        assert gpu.run(plan, ["scan"], budget, {}) == []
    assert limits[0] == plan.limit_seconds == 1.0 and 0 < limits[1] <= 0.5 / gpu.COMPARISONS


def test_decoding_is_compared_with_and_without_graphs(monkeypatch, capsys):
    """Both models take the same kind of step, and what fails for one kind leaves the other."""
    kinds = []
    for kind in ("static_step", "plain_step"):
        make = getattr(decode, kind)
        monkeypatch.setattr(decode, kind, lambda model, state, dtype, kind=kind, make=make: kinds.append(kind) or make(model, state, dtype))
    found = gpu.decoding(gpu.smoke_plan("eager"))
    assert kinds == ["static_step"] * 2 + ["plain_step"] * 2 and found["failed"] == []
    for suffix in ("", "_without_graphs"):
        ms = {name: r["median"] for name, r in found[f"ms_per_token{suffix}"].items()}
        assert found[f"ratio{suffix}"] == ms["full attention"] / ms["samba"]
    out = capsys.readouterr().out
    assert "batch 1, static steps: samba" in out and "batch 1, no graphs: samba" in out

    def broken(model, state, dtype):
        raise RuntimeError("capture")

    monkeypatch.setattr(decode, "static_step", broken)
    found = gpu.decoding(gpu.smoke_plan("eager"))
    assert found["failed"] == ["static steps: RuntimeError: capture"] and found["ratio_without_graphs"] > 0 and "ratio" not in found


def test_replayed_steps_need_a_gpu_and_are_held_to_the_tolerance(monkeypatch, capsys):
    plan, failed = gpu.smoke_plan("eager"), []
    assert "skipped" in gpu.replayed_steps(plan, failed) and failed == []
    assert capsys.readouterr().out == "  decoding steps, graph against none: skipped, a CUDA graph needs a GPU\n"
    # From here on the code of a GPU: the models are never made, as there is no such device.
    plan = dataclasses.replace(plan, device=torch.device("cuda"))
    monkeypatch.setattr(gpu, "model_of", lambda plan, pattern, size: pattern)
    monkeypatch.setattr(decode, "step_difference", lambda pattern, *a: {"mamba": 1e-3}.get(pattern[0], float("nan")))
    found = gpu.replayed_steps(plan, failed)
    assert found["samba"] == 1e-3 and failed == ["decoding steps of full attention: a graph's differ by nan, allowed is 1e-02"]


def test_without_a_gpu_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_cuda_clock_flushes_first_and_reads_milliseconds(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, other):
            return 2500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: log.append("flush"))
    clock = common.cuda_clock(torch.device("cpu"), flush_bytes=8)
    assert clock(lambda: log.append("run")) == 2.5
    assert log == ["flush", "record", "run", "record", "wait"]


def test_pictures(results, monkeypatch, capsys):
    lines = {"ours": [(64, 1.0), (128, 2.0)], "theirs": [(64, 3.0)]}
    assert plots.log_log(results / "a.png", lines, "x", "y", "title")
    assert (results / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    assert not plots.log_log(results / "b.png", lines, "x", "y", "title")
    assert "matplotlib" in capsys.readouterr().out and not (results / "b.png").exists()


def test_flex_and_mask_see_the_same_window(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: real(f, **kw) if kw else f)  # the compiler needs half a minute
    q, k, v = torch.randn(1, 4, 20, 16), torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)
    flex, masked = (make(20, 7, torch.device("cpu"))(q, k, v) for make in (attention.flex, attention.masked))
    torch.testing.assert_close(flex, masked)
