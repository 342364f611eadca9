"""Windowed attention: eager against brute force, grouped heads, packed documents, long rows, caches, a third-party model's mask."""

from __future__ import annotations

import pytest
import torch

from kernels.dispatch import force
from kernels.sliding_window import attention, cached_attention, cpu, eager, reference
from tests.kernels.support import assert_close, compare, gradients


@pytest.fixture(params=["eager", "cpu"], autouse=True)
def backend(request):
    with force(request.param, op="sliding_window"):
        yield request.param


def make(batch=2, heads=4, groups=2, length=13, head_dim=6, dtype=torch.float64):
    q = torch.randn(batch, heads, length, head_dim, dtype=dtype)
    k, v = (torch.randn(batch, groups, length, head_dim, dtype=dtype) for _ in range(2))
    return {"q": q, "k": k, "v": v}, [torch.randn_like(q)]


def segments(batch, length):
    """Rows cut at different places; the first row has documents of one token."""
    starts = torch.zeros(batch, length, dtype=torch.int32)
    starts[0, [length // 3, length // 3 + 1]] = 1
    starts[-1, length // 2] = 1
    return starts.cumsum(dim=1, dtype=torch.int32)


# window None, below, at and above the length; 2 * window < length takes the loop over blocks, with an odd last block
@pytest.mark.parametrize("window", [None, 2, 4, 6, 7, 12, 13, 50])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_float64_matches_brute_force(window, packed, groups):
    inputs, cotangents = make(groups=groups)
    ids = segments(2, 13) if packed else None
    expected = gradients(lambda **kw: (reference.attention(**kw, window=window, segment_ids=ids),), inputs, cotangents)
    compare(gradients(lambda **kw: (attention(**kw, window=window, segment_ids=ids),), inputs, cotangents), expected, 1e-12)


# blocks of the CPU path are 64 queries: below, at and above one and two of them, with an odd end
@pytest.mark.parametrize("length", [2, 63, 64, 65, 128, 150])
def test_float32_lengths(length):
    inputs, cotangents = make(length=length, head_dim=16, dtype=torch.float32)
    doubled = {k: v.double() for k, v in inputs.items()}
    expected = gradients(lambda **kw: (reference.attention(**kw, window=16),), doubled, cotangents)
    compare(gradients(lambda **kw: (attention(**kw, window=16),), inputs, cotangents), expected, 1e-5)  # measured: below 4e-7


@pytest.mark.parametrize("window", [None, 70])
def test_several_blocks_of_packed_documents(window):
    inputs, cotangents = make(length=200)
    ids = segments(2, 200)
    expected = gradients(lambda **kw: (reference.attention(**kw, window=window, segment_ids=ids),), inputs, cotangents)
    compare(gradients(lambda **kw: (attention(**kw, window=window, segment_ids=ids),), inputs, cotangents), expected, 1e-12)


def test_rows_too_long_to_keep_their_weights_train_in_eager(monkeypatch):
    inputs, _ = make(length=100)
    inputs["q"].requires_grad_()
    kept = cpu.attention(**inputs, window=70)
    monkeypatch.setattr(cpu, "_MAX_KEPT_BYTES", cpu._kept_bytes(inputs["q"], 70) - 1)
    assert "Blocked" in kept.grad_fn.name()
    assert "Blocked" not in cpu.attention(**inputs, window=70).grad_fn.name()


@pytest.mark.parametrize(("length", "window"), [(1, 3), (13, 1)])
def test_a_query_that_sees_only_itself_returns_its_value(length, window):
    inputs, cotangents = make(length=length)
    result = gradients(lambda **kw: (attention(**kw, window=window),), inputs, cotangents)
    assert_close(result["out0"], inputs["v"].repeat_interleave(2, dim=1), 1e-12, "o")
    assert_close(result["d_v"], cotangents[0].unflatten(1, (2, 2)).sum(dim=2), 1e-12, "d_v")
    assert result["d_q"].abs().max() < 1e-12 and result["d_k"].abs().max() < 1e-12


def test_packed_documents_equal_separate_rows():
    inputs, _ = make(batch=1, length=20)
    ids = torch.tensor([[0] * 7 + [1] + [2] * 12])
    packed = attention(**inputs, window=3, segment_ids=ids)
    pieces = [attention(*(inputs[n][:, :, a:b] for n in ("q", "k", "v")), window=3) for a, b in ((0, 7), (7, 8), (8, 20))]
    assert_close(packed, torch.cat(pieces, dim=2), 1e-12, "o")


def test_the_window_holds_that_many_keys_with_the_query_itself():
    inputs, _ = make(length=9)
    before = attention(**inputs, window=3)
    inputs["v"] = inputs["v"].clone()
    inputs["v"][:, :, 2] += 1.0
    changed = (attention(**inputs, window=3) - before).abs().amax(dim=(0, 1, 3)) > 0
    assert changed.tolist() == [False, False, True, True, True, False, False, False, False]


def test_scale():
    inputs, _ = make()
    assert_close(attention(**inputs, window=4, scale=0.1), reference.attention(**inputs, window=4, scale=0.1), 1e-12, "o")
    assert (attention(**inputs, scale=0.1) - attention(**inputs)).abs().max() > 1e-3


def test_bfloat16_and_strided_heads():
    q, k, v = (torch.randn(2, 40, h, 16).bfloat16().transpose(1, 2) for h in (4, 2, 2))
    out = attention(q, k, v, window=8)
    assert out.dtype == torch.bfloat16
    assert_close(out, reference.attention(q.double(), k.double(), v.double(), window=8), 5e-3, "o")  # bf16 weights and result


# Relative RMS errors measured on three seeds: forward 2.5e-3 at most; gradients of q, k and v as in the bounds' comments.
BF16_GRADIENTS = {
    "cpu": {"d_q": 4.5e-3, "d_k": 4.7e-3, "d_v": 3.4e-3},  # 3.9e-3, 4.0e-3, 2.9e-3
    "eager": {"d_q": 3.1e-3, "d_k": 5.8e-3, "d_v": 5.6e-3},  # 2.6e-3, 5.0e-3, 4.8e-3
}


@pytest.mark.parametrize(("length", "window"), [(256, None), (256, 128), (150, 70)])
def test_bfloat16_gradients(backend, length, window):
    inputs, cotangents = make(heads=6, length=length, head_dim=32, dtype=torch.bfloat16)
    doubled = {k: v.double() for k, v in inputs.items()}
    expected = gradients(lambda **kw: (reference.attention(**kw, window=window),), doubled, cotangents)
    actual = gradients(lambda **kw: (attention(**kw, window=window),), inputs, cotangents)
    for name, bound in BF16_GRADIENTS[backend].items():
        assert_close(actual[name], expected[name], bound, name)


@pytest.mark.parametrize("window", [None, 64])
def test_packed_rows_hold_no_mask_over_the_whole_row(monkeypatch, window):
    """Neither at once, nor all blocks together until the backward."""
    length, size = 600, 64
    monkeypatch.setattr(eager, "_QUERIES", size)
    inputs, _ = make(length=length)
    sizes, kept = [], []
    visible = eager._visible
    monkeypatch.setattr(eager, "_visible", lambda *args: sizes.append(visible(*args).numel()) or visible(*args))
    ids = segments(2, length)

    def keep(tensor):
        kept.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = eager.attention(**{k: v.requires_grad_() for k, v in inputs.items()}, window=window, segment_ids=ids)
    assert len(sizes) == -(-length // size) and max(sizes) <= 2 * length * size
    held = sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())
    assert held < 8 * 2 * length * 2 * 3 * size  # doubles: a mask of 2 * window a query, then inputs and outputs; the whole is 5.8e6
    out.sum().backward()
    assert_close(out, reference.attention(**inputs, window=window, segment_ids=ids), 1e-12, "o")


def test_blocks_without_a_window_equal_brute_force(monkeypatch):
    monkeypatch.setattr(eager, "_QUERIES", 16)
    inputs, cotangents = make(length=53)
    ids = segments(2, 53)
    expected = gradients(lambda **kw: (reference.attention(**kw, segment_ids=ids),), inputs, cotangents)
    compare(gradients(lambda **kw: (eager.attention(**kw, segment_ids=ids),), inputs, cotangents), expected, 1e-12)


def test_equals_the_mask_of_transformers():
    masks = pytest.importorskip("transformers.masking_utils", reason="transformers is not installed")
    overlay = masks.sliding_window_causal_mask_function(4)
    zero, positions = torch.tensor(0), torch.arange(13)
    visible = torch.tensor([[bool(overlay(zero, zero, i, j)) for j in positions] for i in positions])
    assert torch.equal(eager._visible(0, 13, 0, 4, None, torch.device("cpu")), visible)


@pytest.mark.parametrize("window", [None, 1, 3, 4])
def test_cached_steps_equal_the_whole_row(window):
    inputs, _ = make(length=13)
    whole = attention(**inputs, window=window)
    slots = 13 if window is None else window
    order = torch.randperm(slots)  # slots in any order
    for t in range(13):
        keys = torch.full((2, slots), -1)
        k, v = (torch.full((2, 2, slots, 6), 1e3, dtype=torch.float64) for _ in range(2))  # what an empty slot holds must not matter
        for position in range(max(0, t - slots + 1), t + 1):
            slot = order[position % slots]
            keys[:, slot] = position
            k[:, :, slot], v[:, :, slot] = inputs["k"][:, :, position], inputs["v"][:, :, position]
        out = cached_attention(inputs["q"][:, :, t : t + 1], k, v, keys, torch.full((2, 1), t), window)
        assert_close(out, whole[:, :, t : t + 1], 1e-12, f"position {t}")


def test_cached_rows_at_different_positions():
    inputs, _ = make(length=8)
    keys = torch.stack([torch.arange(8), torch.tensor([5, 6, 7, 8, 1, 2, 3, 4])])
    queries = torch.tensor([[2, 3, 7], [6, 8, 8]])
    args = (inputs["q"][:, :, :3], inputs["k"], inputs["v"], keys, queries)
    for window in (None, 2):
        assert_close(cached_attention(*args, window), reference.cached_attention(*args, window), 1e-12, "o")


def cache(size, heads=6, groups=3, queries=1, slots=37, rows=3):
    """Rows of different lengths in a cache of float32."""
    lengths = torch.tensor([[slots], [5], [slots // 2]])[:rows]
    held = torch.where(torch.arange(slots) < lengths, torch.arange(slots), -1)
    k, v = (torch.randn(rows, groups, slots, size) for _ in range(2))
    inputs = {"q": torch.randn(rows, queries, heads, size).transpose(1, 2), "k": k, "v": v}
    return inputs | {"key_positions": held, "query_positions": lengths - queries + torch.arange(queries)}


# heads that fill one vector, several, and more than are unrolled; groups of 1, 2, 6 and (5: no multiple of 4 query heads) 5
@pytest.mark.parametrize("size", [16, 32, 48, 80, 128, 256])
@pytest.mark.parametrize(("heads", "groups"), [(6, 3), (3, 3), (6, 1), (5, 1)])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("queries", [1, 4])
def test_few_queries_in_float32(size, heads, groups, window, queries):
    inputs = cache(size, heads, groups, queries)
    doubled = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    expected = reference.cached_attention(**doubled, window=window)
    assert_close(cached_attention(**inputs, window=window), expected, 1e-6, "o")  # measured: below 5e-7


@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_rows_are_the_same_to_the_last_bit_in_any_company(threads, monkeypatch):
    assert cpu._library() is not None, "no C compiler here: these tests would compare eager with itself"
    inputs = cache(32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    whole = cpu.cached_attention(**inputs)
    for name in ("k", "v"):  # what a query does not see is not read
        inputs[name] = inputs[name].masked_fill(inputs["key_positions"].eq(-1)[:, None, :, None], torch.nan)
    assert torch.equal(cpu.cached_attention(**inputs), whole)
    one = {name: x[1:2] for name, x in inputs.items()}
    short = one | {"k": one["k"][:, :, :5], "v": one["v"][:, :, :5], "key_positions": one["key_positions"][:, :5]}
    assert torch.equal(cpu.cached_attention(**one), whole[1:2]) and torch.equal(cpu.cached_attention(**short), whole[1:2])


def test_without_a_compiler_eager_serves(monkeypatch, caplog):
    def refuse(source):
        raise ImportError("no C compiler: install gcc, or set CC")

    cpu._library.cache_clear()
    monkeypatch.setattr(cpu, "load_library", refuse)
    with caplog.at_level("WARNING", logger="kernels.sliding_window.cpu"):
        found = [cpu.cached_attention(**cache(32)).isfinite().all() for _ in range(2)]
    cpu._library.cache_clear()
    assert all(found) and len(caplog.records) == 1 and "no C compiler" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_gives_zeros(dtype):
    inputs, _ = make(length=4, dtype=dtype)
    out = cached_attention(**inputs, key_positions=torch.full((2, 4), -1), query_positions=torch.arange(4).repeat(2, 1))
    assert out.abs().max() == 0


@pytest.mark.parametrize("window", [None, 2])
def test_gradcheck(window):
    inputs, _ = make(batch=1, heads=2, groups=1, length=5, head_dim=2)
    function = lambda q, k, v: attention(q, k, v, window, torch.tensor([[0, 0, 0, 1, 1]]))  # noqa: E731
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 3, 13, 6), "v": torch.zeros(2, 3, 13, 6)}, "k's heads do not divide q's"),
        ({"k": torch.zeros(2, 2, 12, 6).double(), "v": torch.zeros(2, 2, 12, 6).double()}, "use cached_attention"),
        ({"v": torch.zeros(2, 2, 13, 5)}, "v has shape"),
        ({"q": torch.zeros(2, 4, 13, 6, dtype=torch.float32)}, "expected one dtype"),
        ({"window": 0}, "window is 0; expected at least 1, or None"),
        ({"segment_ids": torch.zeros(2, 12)}, "segment_ids has shape"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        attention(**{**make()[0], **change})
