"""Windowed attention in Triton against brute force in float64: windows, documents, groups, strides, edges of tiles, what is read at all.

Without a GPU the kernels run in Triton's interpreter, on tiles of 16; the slow test compiles them for the hardware.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kernels.dispatch import force
from kernels.sliding_window import attention, cached_attention, decode_kernel, eager, reference, triton_kernel
from tests.kernels.compile_support import MAX_SHARED_BYTES, compiled_launches
from tests.kernels.support import assert_close, compare, gradients

pytestmark = pytest.mark.interpret
DEVICE = "cpu" if triton_kernel._INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def backend():
    with force("triton", op="sliding_window"):
        yield


def make(batch=1, heads=2, groups=1, length=40, head_dim=16, dtype=torch.float32):
    q = torch.randn(batch, heads, length, head_dim).to(DEVICE, dtype)
    k, v = (torch.randn(batch, groups, length, head_dim).to(DEVICE, dtype) for _ in range(2))
    return {"q": q, "k": k, "v": v}, [torch.randn_like(q)]


def check(inputs, cotangents, tolerance=1e-5, **options):
    """Results and gradients, of which the reference gets what the inputs say in float64."""
    actual = gradients(lambda **kw: (attention(**kw, **options),), inputs, cotangents)
    doubled = {k: v.double() for k, v in inputs.items()}
    expected = gradients(lambda **kw: (reference.attention(**kw, **options),), doubled, [c.double() for c in cotangents])
    compare(actual, expected, tolerance)
    return actual


def documents(*sizes):
    return torch.cat([torch.full((size,), i, dtype=torch.int32) for i, size in enumerate(sizes)]).to(DEVICE)


# fp32, measured: below 3e-7. Lengths below, at and above tiles; windows inside a tile, across some, at the length and above it.
@pytest.mark.parametrize(("length", "window"), [(3, None), (16, 5), (33, 2), (34, 16), (40, 40), (34, 100), (34, None)])
def test_windows_and_lengths(length, window):
    check(*make(length=length), window=window)


@pytest.mark.parametrize("window", [None, 20])
def test_documents(window):
    ids = torch.stack([documents(7, 1, 40), documents(16, 32, 0)])  # a document of one token; one that ends where a tile does
    check(*make(batch=2, heads=1, length=48), window=window, segment_ids=ids)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (2, 2), (3, 1)])
def test_grouped_heads(heads, groups):
    check(*make(heads=heads, groups=groups, length=20), window=9)


@pytest.mark.parametrize("head_dim", [6, 48, 96, 256])
def test_head_dims(head_dim):
    check(*make(heads=1, head_dim=head_dim, length=20), window=11)


@pytest.mark.parametrize(("tiles", "window"), [((16, 32), 40), ((32, 16), None), ((32, 16), 40)])
def test_tiles_of_two_sizes(monkeypatch, tiles, window):
    monkeypatch.setattr(triton_kernel, "_tiles", lambda *args: dict(zip(("QUERIES", "KEYS"), tiles)))
    check(*make(heads=1, length=67), window=window)


@pytest.mark.parametrize(("length", "window"), [(1, None), (20, 1)])
def test_a_query_that_sees_only_itself_returns_its_value(length, window):
    inputs, cotangents = make(length=length)
    result = gradients(lambda **kw: (attention(**kw, window=window),), inputs, cotangents)
    assert torch.equal(result["out0"], inputs["v"].expand_as(result["out0"]))
    assert_close(result["d_v"], cotangents[0].sum(dim=1, keepdim=True), 1e-6, "d_v")
    assert max(result[name].abs().max() for name in ("d_q", "d_k")) < 1e-5


# Relative RMS errors measured in the interpreter, the largest of output and gradients over three seeds: bf16 4.0e-3 (its stores cut the
# low bits off instead of rounding, so that one alone costs 3e-3), fp16 2.9e-4.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float16, 4e-4)])
def test_half_precision(dtype, tolerance):
    actual = check(*make(dtype=dtype), tolerance=tolerance if DEVICE == "cpu" else 1e-2, window=17)
    assert {x.dtype for x in actual.values()} == {dtype}


def test_views_of_a_fused_projection_are_read_in_place():
    fused = torch.randn(1, 17, 4, 16, device=DEVICE).transpose(1, 2)  # (B, H + 2 G, T, K)
    inputs = dict(zip("qkv", fused.split([2, 1, 1], dim=1)))
    out = attention(**inputs, window=7)
    assert not inputs["q"].is_contiguous() and out.transpose(1, 2).is_contiguous()  # o_proj's reshape copies nothing
    check(inputs, [torch.randn_like(out)], window=7)
    check({k: v[..., ::2] for k, v in inputs.items()}, [torch.ones(1, device=DEVICE).expand(1, 2, 17, 8)], window=7)


def test_scale():
    inputs, cotangents = make(length=20)
    check(inputs, cotangents, window=9, scale=0.7)


def test_gradients_are_bitwise_reproducible_and_leave_a_frozen_side_alone():
    inputs, cotangents = make(length=17)
    first, second = (gradients(lambda **kw: (attention(**kw, window=9),), inputs, cotangents) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    q = inputs["q"].clone().requires_grad_()
    attention(q, inputs["k"], inputs["v"], window=9).backward(cotangents[0])
    assert torch.equal(q.grad, first["d_q"])


@pytest.mark.parametrize(("window", "ids"), [(16, None), (None, [32, 32]), (None, [30, 34])])
def test_tiles_out_of_sight_are_never_read(monkeypatch, window, ids):
    """NaN there would otherwise come through the mask, as 0 * NaN."""
    monkeypatch.setattr(triton_kernel, "_tiles", lambda *args: {"QUERIES": 16, "KEYS": 16})
    inputs, cotangents = make(heads=1, length=64)
    ids = None if ids is None else documents(*ids).unsqueeze(0)
    for name in ("k", "v"):
        inputs[name][:, :, :16] = float("nan")
    cotangents[0][:, :, :32] = 0
    assert attention(**inputs, window=window, segment_ids=ids)[:, :, 32:].isfinite().all()

    inputs, cotangents = make(heads=1, length=64)
    cotangents[0][:, :, 48:] = float("nan")
    result = gradients(lambda **kw: (attention(**kw, window=window, segment_ids=ids),), inputs, cotangents)
    assert result["d_k"][:, :, :16].isfinite().all() and result["d_v"][:, :, :16].isfinite().all()
    assert result["d_q"][:, :, :48].isfinite().all() and result["d_v"][:, :, 48:].isnan().all()


def test_which_calls_torch_serves():
    serves = triton_kernel._torch_serves
    assert serves("cuda", torch.bfloat16, 64, None, False) and serves("cuda", torch.float16, 64, 64, False)
    assert not serves("cuda", torch.bfloat16, 64, 63, False)  # a window that cuts
    assert not serves("cuda", torch.bfloat16, 64, None, True)
    assert not serves("cuda", torch.float32, 64, None, False)
    assert not serves("cpu", torch.bfloat16, 64, None, False)


def test_which_kernel_runs():
    inputs, _ = make(length=3)
    inputs["q"].requires_grad_()
    assert "WindowedAttention" in attention(**inputs).grad_fn.name()
    doubled = {k: v.detach().double() for k, v in inputs.items()}
    assert torch.equal(attention(**doubled, window=2), eager.attention(**doubled, window=2))


def cache(batch=2, heads=4, groups=2, slots=40, times=1, head_dim=6, dtype=torch.float32, empty=5):
    """Slots in any order, some empty and holding NaN; rows at different positions."""
    q = torch.randn(batch, heads, times, head_dim).to(DEVICE, dtype)
    k, v = (torch.randn(batch, groups, slots, head_dim).to(DEVICE, dtype) for _ in range(2))
    keys = torch.stack([torch.randperm(slots) + 3 * i for i in range(batch)]).to(DEVICE)
    for row in range(batch):
        gone = torch.randperm(slots)[:empty].to(DEVICE)
        keys[row, gone] = -1
        k[row, :, gone] = v[row, :, gone] = float("nan")
    return {
        "q": q,
        "k": k,
        "v": v,
        "key_positions": keys,
        "query_positions": keys.amax(dim=1, keepdim=True) + torch.arange(times).to(DEVICE),
    }


def check_cache(inputs, tolerance=1e-5, **options):
    actual = cached_attention(**inputs, **options)
    doubled = {k: v.double().nan_to_num(nan=7.0) if v.is_floating_point() else v for k, v in inputs.items()}
    assert actual.dtype == inputs["q"].dtype
    assert_close(actual, reference.cached_attention(**doubled, **options), tolerance, "o")  # fp32, measured: below 2e-7


@pytest.mark.parametrize("split_slots", [256, 16, 20])
@pytest.mark.parametrize("window", [None, 1, 20])
def test_a_step_against_a_cache(monkeypatch, split_slots, window):
    monkeypatch.setattr(decode_kernel, "_SPLIT_SLOTS", split_slots)
    check_cache(cache(), window=window)


@pytest.mark.parametrize(("heads", "groups", "times", "rows"), [(3, 1, 1, 64), (2, 2, 3, 64), (4, 1, 5, 16)])
def test_a_step_of_grouped_heads_and_several_queries(monkeypatch, heads, groups, times, rows):
    monkeypatch.setattr(decode_kernel, "_ROWS", rows)
    check_cache(cache(heads=heads, groups=groups, times=times, head_dim=20), window=9, scale=0.7)


def test_a_step_in_half_precision_and_from_strided_memory(monkeypatch):
    monkeypatch.setattr(decode_kernel, "_SPLIT_SLOTS", 16)
    check_cache(cache(dtype=torch.bfloat16), tolerance=5e-3)  # measured in the interpreter, whose stores truncate: 3.7e-3
    inputs = cache()
    for name in ("k", "v"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["query_positions"] = inputs["query_positions"].amax().view(1, 1).expand(2, 1)
    check_cache(inputs)


@pytest.mark.parametrize("split_slots", [256, 16])
def test_a_query_that_sees_nothing_gives_zeros(monkeypatch, split_slots):
    monkeypatch.setattr(decode_kernel, "_SPLIT_SLOTS", split_slots)
    assert cached_attention(**cache(empty=40)).abs().max() == 0


def test_cached_steps_equal_the_whole_row():
    inputs, _ = make(length=20)
    whole, positions = attention(**inputs, window=9), torch.arange(20, device=DEVICE).unsqueeze(0)
    for t in (0, 8, 9, 19):
        now = inputs["q"][:, :, t : t + 1], inputs["k"], inputs["v"], positions, positions[:, t : t + 1]
        assert_close(cached_attention(*now, window=9), whole[:, :, t : t + 1], 1e-6, f"position {t}")


def test_a_step_that_trains_has_gradients():
    inputs = cache(empty=0)
    inputs["q"].requires_grad_()
    with force("eager", op="sliding_window"):
        expected = cached_attention(**inputs)
    actual = cached_attention(**inputs)
    assert torch.equal(actual, expected) and actual.grad_fn is not None


def launches():
    """What the models launch, for `compiled_launches`."""
    for dtype, head_dim, packed in (
        (torch.bfloat16, 64, True),
        (torch.bfloat16, 128, False),
        (torch.bfloat16, 256, True),
        (torch.float32, 128, False),
    ):
        fused = torch.zeros(1, 64, 4, head_dim, dtype=dtype, requires_grad=True).transpose(1, 2)
        ids = torch.zeros(1, 64, dtype=torch.int32) if packed else None
        triton_kernel.attention(*fused.split([2, 1, 1], dim=1), window=32, segment_ids=ids).sum().backward()
        for slots in (64, 2048):
            q, cache = torch.zeros(1, 8, 1, head_dim, dtype=dtype), torch.zeros(1, 2, slots, head_dim, dtype=dtype)
            triton_kernel.cached_attention(q, cache, cache, torch.arange(slots).view(1, -1), torch.tensor([[slots]]), window=32)


@pytest.mark.slow
def test_compiles_without_spills():
    compiled = compiled_launches("tests.kernels.test_sliding_window_triton")
    assert {c.kernel for c in compiled} == {"_forward", "_backward_queries", "_backward_keys", "_attend_slots", "_combine"}
    assert len(compiled) == 2 * 4 * (3 + 3)
    for c in compiled:
        assert c.shared_bytes <= MAX_SHARED_BYTES[c.capability] and c.stack_bytes <= 16, c  # at most four registers spilled, measured
