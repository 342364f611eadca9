"""Which backend runs, and what the user hears about it."""

from __future__ import annotations

import logging
import subprocess
import sys
import types

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import available, force, pick
from kernels.rms_norm import rms_norm

OPS = ("selective_scan", "causal_conv1d", "sliding_window", "rope", "cross_entropy", "rms_norm", "swiglu", "newton_schulz", "orthonormal")


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    monkeypatch.setattr(dispatch, "_picked", {})


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_specification_and_a_fast_path(op):
    assert {"eager", "reference"} <= set(available(op))
    offered = dispatch.ORDER["cpu"]
    assert pick(op, "cpu").__name__ in [f"kernels.{op}.{dispatch.MODULES[name]}" for name in offered]


def test_force_nests_and_ends():
    with force("reference"):
        assert pick("rope", "cpu").__name__ == "kernels.rope.reference"
        with force("eager", op="rope"):
            assert pick("rope", "cpu").__name__ == "kernels.rope.eager"
            assert pick("swiglu", "cpu").__name__ == "kernels.swiglu.reference"
        assert pick("rope", "cpu").__name__ == "kernels.rope.reference"
    assert pick("rope", "cpu").__name__ != "kernels.rope.reference"


def test_force_ends_after_an_error():
    with pytest.raises(RuntimeError), force("reference"):
        raise RuntimeError
    assert not dispatch._forced


def test_unknown_and_missing_backends():
    with pytest.raises(ValueError, match=r"backend: 'trition'; allowed are auto, triton, cpu, eager, reference"), force("trition"):
        pass
    with pytest.raises(ValueError, match=r"kernels.swiglu has no backend 'cpu'; it offers .*eager"):
        pick("swiglu", "cpu", "cpu")


def test_the_choice_is_logged_once(caplog):
    caplog.set_level(logging.INFO, logger="kernels.dispatch")
    x = torch.ones(2, 3)
    rms_norm(x, torch.ones(3))
    rms_norm(x, torch.ones(3))
    assert [r.getMessage() for r in caplog.records] == ["kernels.rms_norm on cpu: cpu"]


def test_a_slower_backend_on_cuda_warns(monkeypatch):
    def load(name):
        if name.endswith("triton_kernel"):
            raise ImportError("No module named 'triton'")
        return types.ModuleType(name)

    monkeypatch.setattr(dispatch, "available", lambda op: ["triton", "eager", "reference"])
    monkeypatch.setattr(dispatch, "import_module", load)
    with pytest.warns(UserWarning, match=r"kernels.rope on cuda: backend triton cannot be loaded \(No module named 'triton'\)"):
        assert pick("rope", torch.device("cuda")).__name__ == "kernels.rope.eager"


def test_kernels_is_ours_and_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        + "".join(f"import kernels.{op}.eager\n" for op in OPS)
        + "import kernels; print(kernels.__file__); print(sorted({'transformers', 'lightning', 'torch._dynamo'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] == dispatch.__file__.replace("dispatch", "__init__") and out[1] == "[]"
