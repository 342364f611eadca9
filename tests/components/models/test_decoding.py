"""The decode state of every model: prefill, chunks, steps, forks and rows at different positions give the logits of the full forward."""

import io

import pytest
import torch

from components.contracts import Batch
from components.decode_state import DecodeState
from tests.components.models.conftest import lively

WINDOW = 16  # of model=samba model/size=test
TOTAL = 3 * WINDOW + 5


def run(model, state, ids):
    with torch.no_grad():
        return model.logits(model(Batch(ids), state).hidden)


def decode(model, ids, splits):
    """Feed ids (B, T) in pieces of the given sizes, then token by token."""
    state = model.new_state(len(ids), ids.shape[1])
    cuts = [*splits, *[1] * (ids.shape[1] - sum(splits))]
    return torch.cat([run(model, state, piece) for piece in ids.split(cuts, dim=1)], dim=1), state


@pytest.mark.parametrize("prompt", [1, 2, 3, 4, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_prefill_then_steps_equal_the_full_forward(model, prompt, full_logits, random_ids, close):
    ids = random_ids(2, TOTAL)
    logits, state = decode(model, ids, [prompt])
    close(logits, full_logits(model, ids))
    assert state.length.tolist() == [TOTAL, TOTAL]


@pytest.mark.parametrize("prompt", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_prefill_then_steps_with_a_window_in_every_layer(make_model, prompt, full_logits, random_ids, close):
    model = lively(make_model("phi4mini", window=WINDOW)).eval()
    ids = random_ids(2, TOTAL)
    close(decode(model, ids, [prompt])[0], full_logits(model, ids))


@pytest.mark.parametrize("splits", [[5, 9, 23], [WINDOW, WINDOW, 7], [1, 40, 2], [40, 13], [2, 2, 2]])
def test_chunked_prefill_of_any_split(model, splits, full_logits, random_ids, close):
    ids = random_ids(2, TOTAL, seed=1)
    logits, _ = decode(model, ids, splits)
    close(logits, full_logits(model, ids))


def test_windowed_attention_alone_forgets(make_model, full_logits, random_ids):
    """In one attention layer the token that left the window changes nothing: catches a ring that keeps one key too many or too few."""
    model = make_model("phi4mini", window=WINDOW, num_layers=1).eval()
    ids = random_ids(1, TOTAL)
    other = ids.clone()
    other[0, 0] += 1
    for logits in (lambda x: full_logits(model, x), lambda x: decode(model, x, [10])[0]):
        difference = (logits(ids) - logits(other)).abs().amax(-1)[0]
        assert difference[:WINDOW].min() > 1e-5 and difference[WINDOW:].max() == 0


def test_rows_at_different_lengths_step_together(model, full_logits, random_ids, close):
    ids = random_ids(4, TOTAL, seed=2)
    prompts = [1, WINDOW - 1, WINDOW + 3, 2 * WINDOW]
    states = []
    for row, prompt in zip(ids, prompts):
        states.append(model.new_state(1, prompt + 12))
        run(model, states[-1], row[None, :prompt])
    state = DecodeState.cat(states)
    assert state.length.tolist() == prompts
    new = torch.stack([row[p : p + 12] for row, p in zip(ids, prompts)])
    logits = torch.cat([run(model, state, piece) for piece in new.split([1, 1, 3, 1, 6], dim=1)], dim=1)
    whole = full_logits(model, ids)
    for i, p in enumerate(prompts):
        close(logits[i], whole[i, p : p + 12])


def test_select_takes_rows_in_order_and_leaves_the_source_alone(model, full_logits, random_ids, close):
    ids = random_ids(3, TOTAL, seed=3)
    state = model.new_state(3, TOTAL)
    run(model, state, ids[:, :20])
    kept = state.select(torch.tensor([2, 0]))
    whole = full_logits(model, ids)
    close(run(model, kept, ids[[2, 0], 20:30]), whole[[2, 0], 20:30])
    masked = state.select(torch.tensor([False, True, False]))
    close(run(model, masked, ids[1:2, 20:30]), whole[1:2, 20:30])
    close(run(model, state, ids[:, 20:30]), whole[:, 20:30])


def test_forked_rows_go_separate_ways(model, full_logits, random_ids, close):
    start, tails = random_ids(2, WINDOW + 2, seed=4), random_ids(6, 9, seed=5)
    state = model.new_state(2, 64)
    run(model, state, start)
    forks = state.fork(3)
    logits = run(model, forks, tails)
    whole = full_logits(model, torch.cat([start.repeat_interleave(3, 0), tails], dim=1))
    close(logits, whole[:, start.shape[1] :])
    assert state.length.tolist() == [WINDOW + 2] * 2


def test_reset_rows_start_anew_beside_others(model, full_logits, random_ids, close):
    ids = random_ids(2, TOTAL, seed=6)
    state = model.new_state(2, 64)
    run(model, state, random_ids(1, 30, seed=7).expand(2, -1))
    run(model, state, random_ids(1, 3, seed=8).expand(2, -1))
    state.reset(torch.tensor([True, False]))
    assert state.length.tolist() == [0, 33]
    close(run(model, state, ids[:, :20])[0], full_logits(model, ids[:1, :20])[0])
    state.reset(torch.tensor([0, 1]))
    close(run(model, state, ids), full_logits(model, ids))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [torch.tensor([0]), torch.tensor([True, False])])
def test_reset_forgets_what_is_not_a_number(model, bad, rows, full_logits, random_ids, close):
    ids = random_ids(2, 30, seed=6)
    state = model.new_state(2, 64)
    run(model, state, random_ids(2, 5, seed=7))
    for layer in state.layers:
        for tensor in layer.tensors:
            tensor[0] = bad
    state.reset(rows)
    logits = torch.cat([run(model, state, piece) for piece in ids.split([1, 9, *[1] * 20], dim=1)], dim=1)
    close(logits[0], full_logits(model, ids[:1])[0])
    assert logits[1].isfinite().all()


def test_save_and_load(model, random_ids):
    ids = random_ids(2, TOTAL, seed=9)
    state = model.new_state(2, TOTAL)
    run(model, state, ids[:, :20])
    file = io.BytesIO()
    torch.save(state.save(), file)
    expected = run(model, state, ids[:, 20:])
    loaded = DecodeState.load(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    torch.testing.assert_close(run(model, loaded, ids[:, 20:]), expected, rtol=0, atol=0)


def test_saved_state_does_not_change_with_later_steps(model, random_ids):
    ids = random_ids(1, TOTAL, seed=9)
    state = model.new_state(1, TOTAL)
    run(model, state, ids[:, :20])
    saved = state.save()
    expected = run(model, state, ids[:, 20:21])
    run(model, state, ids[:, 21:])
    torch.testing.assert_close(run(model, DecodeState.load(saved), ids[:, 20:21]), expected, rtol=0, atol=0)


def test_hybrid_state_has_a_constant_size(make_model, random_ids):
    model = make_model("samba").eval()
    state = model.new_state(1, 10)
    before = state.size_bytes
    run(model, state, random_ids(1, 10 * WINDOW))
    for token in random_ids(1, 3 * WINDOW).split(1, dim=1):
        run(model, state, token)
    assert state.size_bytes == before


def test_full_cache_grows_and_stops_at_max_length(make_model, full_logits, random_ids, close):
    model = make_model("phi4mini").eval()
    ids = random_ids(1, 700)
    logits, state = decode(model, ids, [100, 150, 30, 320, 90])
    close(logits, full_logits(model, ids))
    with pytest.raises(ValueError, match="max_length=700"):
        run(model, state, ids[:, :1])


def test_position_none_decodes_too(make_model, model_name, full_logits, random_ids, close):
    model = make_model(model_name, position="none").eval()
    ids = random_ids(2, TOTAL)
    close(decode(model, ids, [7])[0], full_logits(model, ids))


def test_bf16_state(model, model_name, full_logits, random_ids, close):
    """Keys kept in bf16 cost their 2^-9 rounding, no more (measured: samba 3.3e-3, phi4mini 2.8e-4); recurrent state stays fp32."""
    ids = random_ids(2, TOTAL)
    state = model.new_state(2, TOTAL, torch.bfloat16)
    logits = torch.cat([run(model, state, piece) for piece in ids.split([20] + [1] * (TOTAL - 20), dim=1)], dim=1)
    close(logits, full_logits(model, ids), relative={"samba": 1e-2, "phi4mini": 2e-3}[model_name])
    assert all(t.dtype == torch.float32 for layer in state.layers if hasattr(layer, "ssm") for t in layer.tensors)


def test_steps_under_autocast_agree_with_the_forward_under_autocast(model, random_ids, close):
    ids = random_ids(2, TOTAL)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        whole = model.logits(model(Batch(ids)).hidden).float()
        logits = decode(model, ids, [9])[0].float()
    close(logits, whole, relative=1.5e-2)  # bf16 rounding along two layers; measured: 5.6e-3 for both


def test_mistakes(model, random_ids):
    state = model.new_state(2, 8)
    with pytest.raises(ValueError, match="3 rows"):
        run(model, state, random_ids(3, 2))
    with pytest.raises(ValueError, match="segment_ids"):
        model(Batch(random_ids(2, 2), segment_ids=torch.zeros(2, 2, dtype=torch.int32)), state)
    with pytest.raises(ValueError, match="same model"):
        DecodeState.cat([])
    assert not state.stale_rows().any() and state.stale_rows().shape == (2,)
