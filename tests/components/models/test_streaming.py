"""Decoding without end: states cut and joined midway, positions beyond a million, memory that neither grows nor moves, static steps."""

import gc
import io
import resource
import sys

import pytest
import torch

from components import blocks
from components.contracts import Batch
from components.decode_state import DecodeState
from components.decoding.graph_step import StaticStep, StaticSteps
from components.layer_state import RecurrentState
from tests.components.models.conftest import lively

WINDOW = 16  # of model=samba model/size=test
TOTAL = 6 * WINDOW + 5
FAR = 2**20 + 7  # beyond a million, and no multiple of the window: the ring starts in another slot


def run(model, state, ids):
    with torch.no_grad():
        return model.logits(model(Batch(ids), state).hidden)


def in_pieces(model, state, ids, cuts):
    """Logits of ids (B, T) fed in pieces of the given sizes, the rest token by token."""
    cuts = [*cuts, *[1] * (ids.shape[1] - sum(cuts))]
    return torch.cat([run(model, state, piece) for piece in ids.split(cuts, dim=1)], dim=1)


@pytest.fixture
def samba(make_model):
    return lively(make_model("samba")).eval()


def buffers(state):
    return [state.length, state.regime, *(tensor for layer in state.layers for tensor in layer.tensors)]


@pytest.mark.parametrize(
    "cuts", [[1, WINDOW - 1, 1, WINDOW + 1, 2], [WINDOW + 3, WINDOW - 3, 2 * WINDOW + 1], [3, 5 * WINDOW], [7] * 9, [WINDOW] * 4]
)
def test_uneven_chunks_over_the_ends_of_the_ring(samba, cuts, full_logits, random_ids, close):
    ids = random_ids(2, TOTAL)
    close(in_pieces(samba, samba.new_state(2, TOTAL), ids, cuts), full_logits(samba, ids))


def test_a_life_of_forks_saves_and_rows_that_join(samba, full_logits, random_ids, close):
    """Prefill in chunks, fork for 3 samples, step, save and load, join a row at another position, go on in chunks and steps."""
    start, tails, late = random_ids(1, 2 * WINDOW + 3, seed=1), random_ids(3, 3 * WINDOW, seed=2), random_ids(1, WINDOW + 5, seed=3)
    state = samba.new_state(1, 1)
    in_pieces(samba, state, start, [WINDOW - 2, 9, WINDOW - 4])
    forks = state.fork(3)
    whole = full_logits(samba, torch.cat([start.expand(3, -1), tails], dim=1))[:, start.shape[1] :]
    close(in_pieces(samba, forks, tails[:, :5], []), whole[:, :5])
    file = io.BytesIO()
    torch.save(forks.save(), file)
    forks = DecodeState.load(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    other = samba.new_state(1, 1)
    run(samba, other, late[:, :5])
    joined = DecodeState.cat([forks, other])
    assert joined.length.tolist() == [start.shape[1] + 5] * 3 + [5]
    logits = in_pieces(samba, joined, torch.cat([tails[:, 5 : 5 + WINDOW], late[:, 5:]]), [3, 1, WINDOW - 6])
    close(logits[:3], whole[:, 5 : 5 + WINDOW])
    close(logits[3:], full_logits(samba, late)[:, 5:])
    assert state.length.tolist() == [start.shape[1]]  # what was forked stayed


def moved(model, rows, position):
    """An empty state whose rows stand at `position`. The first chunk must fill the ring: nothing was ever written before it."""
    state = model.new_state(rows, 1)
    state.length.fill_(position)
    return state


def at_offset(model, ids, position):
    state = moved(model, len(ids), position)
    logits = in_pieces(model, state, ids, [WINDOW + 2, 3 * WINDOW])
    assert state.length.tolist() == [position + ids.shape[1]] * len(ids)
    return logits


@pytest.mark.parametrize("position", [FAR, 2**24 + 3, 2**33 + 5])
def test_positions_beyond_a_million_change_nothing(samba, position, random_ids, close):
    """With a window only distances matter, so that a row at `position` must say what it says at 0 (measured: 1e-6 of the largest logit)."""
    ids = random_ids(2, TOTAL)
    close(at_offset(samba, ids, position), at_offset(samba, ids, 0))


def test_angles_in_fp32_would_change_it(samba, monkeypatch, random_ids):
    """The test above has teeth: with fp32 angles, spaced 0.06 rad at a million, the same comparison misses its bound a hundredfold."""

    def fp32_tables(positions, inv_freq, attention_factor=1.0):
        angles = positions.float().unsqueeze(2) * inv_freq.float()
        return angles.cos() * attention_factor, angles.sin() * attention_factor

    ids = random_ids(2, TOTAL)
    monkeypatch.setattr(blocks, "rope_tables", fp32_tables)
    near, far = at_offset(samba, ids, 0), at_offset(samba, ids, FAR)
    assert (far - near).abs().max() / near.abs().max() > 1e-3  # measured: 1e-2


def test_rows_a_million_apart_step_together(samba, full_logits, random_ids, close):
    ids = random_ids(2, TOTAL, seed=4)
    states = [moved(samba, 1, position) for position in (0, FAR)]
    for state, row in zip(states, ids):
        run(samba, state, row[None, : 2 * WINDOW])
    logits = in_pieces(samba, DecodeState.cat(states), ids[:, 2 * WINDOW :], [5])
    close(logits, full_logits(samba, ids)[:, 2 * WINDOW :])


def test_two_thousand_steps_move_and_add_no_buffer(samba, full_logits, random_ids, close):
    ids = random_ids(2, 2000)
    state = samba.new_state(2, 1)
    run(samba, state, ids[:, :3])
    places, size = [tensor.data_ptr() for tensor in buffers(state)], state.size_bytes
    counts = []
    with torch.inference_mode():
        for position in range(3, 2000):
            hidden = samba(Batch(ids[:, position : position + 1]), state).hidden
            if position in (100, 1000, 1999):
                gc.collect()
                counts.append(sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()))
        logits = samba.logits(hidden)
    assert [tensor.data_ptr() for tensor in buffers(state)] == places and state.size_bytes == size
    assert len(set(counts)) == 1  # nor is anything else kept
    close(logits, full_logits(samba, ids)[:, -1:])


def test_recurrent_state_is_not_overwritten_under_a_backward(make_model, random_ids):
    """Gradients of a chunk need the state that it began with; the same chunk from a copy of that state gives the same gradients."""
    model = make_model("samba", layer_pattern=["mamba"])
    ids = random_ids(1, 20)
    state = model.new_state(1, 1)
    run(model, state, ids[:, :8])
    grads = []
    for further in (False, True):
        model.zero_grad()
        own = state.fork(1)
        loss = model(Batch(ids[:, 8:14]), own).hidden.square().sum()
        if further:
            run(model, own, ids[:, 14:])
            model(Batch(ids[:, 14:]), own)
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) > 8 and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_constant_size_is_said_of_rings_and_recurrences_only(make_model, model_name):
    assert make_model("samba").new_state(1, 8).constant_size
    assert not make_model("samba", window=None).new_state(1, 8).constant_size
    assert make_model(model_name, window=WINDOW).new_state(1, 8).constant_size


@pytest.mark.parametrize("name", ["samba", "phi4mini"])
def test_static_step_equals_the_model_and_moves_nothing(make_model, name, random_ids, close):
    """Rows at different positions in a step of capacity 4, loaded twice; every step against `model(batch, state)` on a copy."""
    model = lively(make_model(name, window=WINDOW)).eval()
    prompts = [random_ids(1, n, seed=n) for n in (3, WINDOW, 2 * WINDOW + 1)]
    ids = random_ids(3, 2 * WINDOW + 3, seed=5)
    with torch.inference_mode():
        states = []
        for prompt in prompts:
            states.append(model.new_state(1, 1))
            run(model, states[-1], prompt)
        step = StaticStep(model, states[0], capacity=4)
        places = [tensor.data_ptr() for tensor in (*buffers(step._whole), step._logits, step._ids)]
        for rows in ([0, 1, 2], [2, 0]):
            state = DecodeState.cat([states[row] for row in rows])
            before = [tensor.clone() for tensor in buffers(state)]
            own = state.fork(1)
            step.load(state)
            for token in ids[: len(rows)].split(1, dim=1):
                close(step(token), model.logits(model(Batch(token), own).hidden[:, -1]))
            assert torch.equal(step.state.length, own.length) and step.state._longest == own._longest
            for mine, theirs in zip(buffers(step.state), buffers(own), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
            assert all(torch.equal(a, b) for a, b in zip(before, buffers(state), strict=True))  # what was loaded stayed
        assert [tensor.data_ptr() for tensor in (*buffers(step._whole), step._logits, step._ids)] == places


def test_static_steps_follow_a_changing_batch(samba, full_logits, random_ids, close):
    """In the slots themselves: rows leave, and the last one moves into the hole."""
    ids = random_ids(5, 3 * WINDOW, seed=6)
    steps = StaticSteps(samba)
    state = samba.new_state(5, 1)
    run(samba, state, ids[:, :WINDOW])
    slots = state.resized(8, 1)
    places = [tensor.data_ptr() for tensor in buffers(slots)]
    whole, position, rows = full_logits(samba, ids), WINDOW, [0, 1, 2, 3, 4]
    for left in (None, 3, 0, 1, 0):  # gradients are on: the step turns them off
        if left is not None:
            last = len(rows) - 1
            if left != last:
                slots.put(left, slots.view(last, last + 1))
            rows[left] = rows[-1]
            rows.pop()
        for _ in range(WINDOW // 4):
            close(steps(ids[rows, position : position + 1], slots), whole[rows, position])
            position += 1
    assert sorted(steps._steps) == [1, 2, 4, 8] and [tensor.data_ptr() for tensor in buffers(slots)] == places


def test_resized_and_put_copy_rows_and_leave_nothing_behind(make_model, full_logits, random_ids, close):
    for model in (lively(make_model(name)).eval() for name in ("samba", "phi4mini")):
        ids = random_ids(3, 40, seed=8)
        one, slots = model.new_state(1, 40), model.new_state(1, 40).resized(2, 30)
        for tensor in (tensor for layer in slots.layers for tensor in layer.tensors):
            tensor.fill_(torch.nan)
        slots.put(1, one)
        run(model, one, ids[:1, :20])
        slots.put(0, one)
        more = slots.resized(3, 40)
        close(run(model, more.first(1, 20), ids[:1, 20:30]), full_logits(model, ids[:1])[:, 20:30])
        assert more.length.tolist() == [30, 0, 0] and slots.length.tolist() == [20, 0]  # a copy
        assert all(tensor.isfinite().all() for layer in more.layers for tensor in layer.tensors)


def test_static_step_under_autocast(samba, random_ids, close):
    ids = random_ids(2, 2 * WINDOW)
    with torch.inference_mode():
        state = samba.new_state(2, 1, torch.bfloat16)
        step = StaticStep(samba, state, 2, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            run(samba, state, ids[:, :5])
            step.load(state)
            for token in ids[:, 5:].split(1, dim=1):
                close(step(token), samba.logits(samba(Batch(token), state).hidden[:, -1]).float(), relative=1e-6)


def test_static_step_refuses_what_it_cannot_do(make_model, samba, random_ids):
    growing = make_model("samba", window=None).new_state(1, 8)
    with pytest.raises(ValueError, match="grows with the length"):
        StaticStep(samba, growing, 1)
    step = StaticStep(samba, samba.new_state(1, 1), 2)
    with pytest.raises(ValueError, match="prefill it first"):
        step.load(samba.new_state(1, 1))
    three = samba.new_state(3, 1)
    run(samba, three, random_ids(3, 2))
    with pytest.raises(ValueError, match="3 rows do not fit the capacity of 2"):
        step.load(three)
    step.load(three.select(torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="expected \\(2, 1\\)"):
        step(torch.zeros(1, 1, dtype=torch.int64))
    wider = make_model("samba", window=2 * WINDOW).new_state(2, 1)
    run(make_model("samba", window=2 * WINDOW), wider, random_ids(2, 2))
    with pytest.raises(ValueError, match="does not fit one of"):
        step.load(wider)


def test_fp32_state_of_a_bf16_model(samba):
    assert all(
        t.dtype == torch.float32 for s in samba.new_state(1, 1, torch.bfloat16).layers if isinstance(s, RecurrentState) for t in s.tensors
    )


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_process_memory_does_not_grow_with_the_position(make_model):
    """Tokens 128 to 8192 of size tiny. A key and a value kept for each token would be 4 MiB by themselves; slack: 2 MiB of allocator."""
    model = make_model("samba", "tiny", vocab_size=2048).eval()
    state, token = model.new_state(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    with torch.inference_mode():
        for position in range(8192):
            if position == 128:
                before = resident_bytes()
            token = model.logits(model(Batch(token), state).hidden[:, -1]).argmax(-1, keepdim=True)
    assert resident_bytes() - before < 2 << 20
