"""Layers over packed weights against the written-out forms, and that a row's bits do not depend on the others."""

from __future__ import annotations

import pytest
import torch

from kernels import packed
from kernels.dispatch import force
from kernels.packed import cpu, eager, reference
from tests.kernels.support import assert_close

TOLERANCE = 2e-6  # relative RMS of float32 sums of up to 1100 products; measured: below 7e-7
BACKENDS = pytest.mark.parametrize("backend", [cpu, eager], ids=["cpu", "eager"])

COMPILED = pytest.mark.skipif(not cpu._SUITS, reason="no AVX-512: eager serves, whose rows may differ with their number")


def doubled(value):
    if isinstance(value, tuple):
        return tuple(map(doubled, value))
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


# 32 outputs a panel, 12 rows a tile, 96 a work item, 512 inputs at a time: below, at, above each of them
@BACKENDS
@pytest.mark.parametrize("size", [(1, 1), (32, 512), (48, 16), (70, 1100)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_linear(backend, size, bias, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    weight, shift = torch.randn(size), torch.randn(size[0]) if bias else None
    made, exact = backend.pack(weight, shift), reference.pack(weight.double(), doubled(shift))
    whole = torch.randn(200, 2 * size[1])[:, : size[1]]  # rows apart
    for rows in (1, 2, 11, 12, 13, 35, 96, 97, 200):
        assert_close(backend.linear(whole[:rows], made), reference.linear(whole[:rows].double(), exact), TOLERANCE, f"{rows} rows")
    assert backend.linear(torch.randn(2, 3, size[1]), made).shape == (2, 3, size[0])
    before = backend.linear(whole, made)
    weight.zero_()  # it was copied
    assert torch.equal(backend.linear(whole, made), before)


@COMPILED
@pytest.mark.parametrize("size", [(48, 16), (70, 1100)], ids=str)  # oneDNN's rows of the second differ
@torch.no_grad()
def test_a_row_of_a_product_has_the_same_bits_in_any_company(size):
    made, x = cpu.pack(torch.randn(size)), torch.randn(250, size[1])
    whole = cpu.linear(x, made)
    for begin, end in ((0, 1), (7, 9), (3, 15), (11, 24), (90, 203), (249, 250)):
        assert torch.equal(cpu.linear(x[begin:end], made), whole[begin:end])


@BACKENDS
@pytest.mark.parametrize(("width", "inner"), [(256, 704), (40, 52)])
@torch.no_grad()
def test_mlp(backend, width, inner, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    gate_up, down = torch.randn(2 * inner, width) / width**0.5, torch.randn(width, inner) / inner**0.5
    made, exact = [
        [module.pack(w) for w in weights] for module, weights in ((backend, (gate_up, down)), (reference, doubled((gate_up, down))))
    ]
    branch, stream, norm = torch.randn(50, 2, width), torch.randn(50, 2, width), (torch.randn(width), 1e-3)
    assert_close(backend.mlp(branch, *made), reference.mlp(branch.double(), *exact), TOLERANCE, "mlp")
    found = backend.mlp_block(branch, stream, norm, *made)
    assert_close(found, reference.mlp_block(*doubled((branch, stream, norm)), *exact), TOLERANCE, "mlp_block")
    if backend is cpu and cpu._SUITS:
        assert torch.equal(cpu.mlp_block(branch[7:8], stream[7:8], norm, *made), found[7:8])


class Layer:
    """An attention and two caches: that of a backend, and that of the reference in float64."""

    def __init__(self, backend, heads, groups, size, window, rows=3, width=64, slots=40):
        self.backend, self.heads, self.window, self.width, self.size = backend, heads, window, width, size
        weights = torch.randn((heads + 2 * groups) * size, width) / 8, torch.randn(width, heads * size) / 8
        self.weights, self.exact = [backend.pack(w) for w in weights], [reference.pack(w.double()) for w in weights]
        self.norm = torch.rand(width) + 0.5, 1e-5
        self.cache = [torch.zeros(rows, groups, window or slots, size) for _ in range(2)]
        self.exact_cache = list(doubled(tuple(self.cache)))
        self.read = torch.zeros(rows, dtype=torch.int64)

    def call(self, x, rope, fresh=False, rows=slice(None), norm=True):
        """Of some of the rows; changes their cache."""
        positions = self.read[rows, None] + torch.arange(x.shape[1])
        cache, norm = [part[rows] for part in self.cache], self.norm if norm else None
        return self.backend.attention(x, norm, *self.weights, rope, *cache, positions, self.heads, self.window, fresh)

    def check(self, tokens, fresh=False, norm=True, turned=True):
        x, angles = torch.randn(len(self.read), tokens, self.width), torch.randn(len(self.read), tokens, self.size // 4)
        rope = (angles.cos(), angles.sin()) if turned else None
        positions, own = self.read[:, None] + torch.arange(tokens), self.norm if norm else None
        expected = reference.attention(
            x.double(), doubled(own), *self.exact, doubled(rope), *self.exact_cache, positions, self.heads, self.window, fresh
        )
        assert_close(self.call(x, rope, fresh, norm=norm), expected, TOLERANCE, f"{tokens} tokens after {self.read.tolist()}")
        for mine, theirs in zip(self.cache, self.exact_cache, strict=True):
            assert_close(mine, theirs, TOLERANCE, "cache")
        self.read += tokens


@BACKENDS
@pytest.mark.parametrize(("heads", "groups", "size"), [(8, 2, 32), (6, 6, 16), (5, 1, 48), (4, 2, 8)])  # heads of 8 are left to eager
@pytest.mark.parametrize("window", [None, 9, 20])
@torch.no_grad()
def test_attention(backend, heads, groups, size, window, monkeypatch):
    """A prompt longer and shorter than the window, steps round the ring, and a second piece where there is no window."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    layer = Layer(backend, heads, groups, size, window)
    layer.check(17, fresh=True)
    for _ in range(4 if window is None else 12):
        layer.check(1)
    if window is None:
        layer.check(5, norm=False, turned=False)


@COMPILED
@pytest.mark.parametrize("window", [None, 9])
@torch.no_grad()
def test_a_row_attends_with_the_same_bits_in_any_company_and_reads_nothing_that_it_does_not_see(window):
    layer = Layer(cpu, 8, 2, 32, window, rows=5)
    layer.call(torch.randn(5, 6, 64), None, fresh=True)
    layer.read += 6
    for part in layer.cache:
        part[:, :, 7:] = torch.nan
    x, before = torch.randn(5, 1, 64), [part.clone() for part in layer.cache]
    whole = layer.call(x, None)
    assert whole.isfinite().all()
    for part, kept in zip(layer.cache, before, strict=True):
        part.copy_(kept)
    assert torch.equal(layer.call(x[2:4], None, rows=slice(2, 4)), whole[2:4])


class Mixer:
    """A Mamba mixer and its states: of a backend, and of the reference in float64."""

    PROJECTIONS = (0, 3, 4, 8)

    def __init__(self, backend, width, channels, states, taps, rank, rows=3):
        self.backend, self.width = backend, width
        into, out = torch.randn(2 * channels, width) / width**0.5, torch.randn(width, channels) / channels**0.5
        low, dt = torch.randn(rank + 2 * states, channels) / channels**0.5, torch.randn(channels, rank)
        conv, decay = torch.randn(channels, taps), -4 * torch.rand(channels, states)
        shift, bias, skip = torch.randn(channels), torch.randn(channels) - 2, torch.randn(channels)
        weights = into, conv, shift, low, dt, bias, decay, skip, out
        self.weights = backend.pack_mamba(*(backend.pack(w) if i in self.PROJECTIONS else w for i, w in enumerate(weights)))
        self.exact = reference.pack_mamba(*(reference.pack(w) if i in self.PROJECTIONS else w for i, w in enumerate(doubled(weights))))
        self.norm = torch.rand(width) + 0.5, 1e-5
        self.states = [torch.randn(rows, taps - 1, channels), torch.randn(rows, channels, states)]
        self.exact_states = list(doubled(tuple(self.states)))

    def check(self, x, norm=True):
        own = self.norm if norm else None
        expected = reference.mamba(x.double(), doubled(own), self.exact, *self.exact_states)
        # an exponential of sums: 4 times what a product may be off; measured: below 1.8e-6
        assert_close(self.backend.mamba(x, own, self.weights, *self.states), expected, 4 * TOLERANCE, f"{x.shape[1]} tokens")
        for name, mine, theirs in zip(("taps", "state"), self.states, self.exact_states, strict=True):
            assert_close(mine, theirs, 4 * TOLERANCE, name)


# whole vectors and squares of 16, and neither; two taps; more states than a square; 17 taps are left to eager
@BACKENDS
@pytest.mark.parametrize("shape", [(64, 128, 16, 4, 8), (40, 72, 6, 4, 3), (24, 48, 17, 2, 2), (16, 32, 4, 17, 1)], ids=str)
@torch.no_grad()
def test_mamba(backend, shape, monkeypatch):
    """A prompt longer than a chunk of 16, steps, a second piece; without a norm; of rows that lie apart."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    mixer = Mixer(backend, *shape)
    for tokens in (35, 1, 1, 5):
        mixer.check(torch.randn(3, tokens, mixer.width))
    mixer.check(torch.randn(3, 4, 2 * mixer.width)[..., : mixer.width], norm=False)


@torch.no_grad()
def test_what_the_c_mixer_cannot_read_is_left_to_eager():
    for shape in ((8, 16, 257, 4, 1), (8, 16, 4, 17, 1)):  # more states, more taps
        assert isinstance(Mixer(cpu, *shape).weights, eager.Mamba)
    mixer = Mixer(cpu, 40, 72, 6, 4, 3)
    x, before = torch.randn(3, 1, 40), [part.clone() for part in mixer.states]
    expected = cpu.mamba(x, mixer.norm, mixer.weights, *mixer.states)
    wider = [torch.cat([part, part], dim=-1)[..., : part.shape[-1]] for part in before]  # not contiguous
    assert_close(cpu.mamba(x, mixer.norm, mixer.weights, *wider), expected.double(), 4 * TOLERANCE, "states that lie apart")
    assert_close(wider[1], mixer.states[1].double(), 4 * TOLERANCE, "state")


@COMPILED
@torch.no_grad()
def test_a_row_of_a_mixer_has_the_same_bits_in_any_company_and_pieces_are_the_whole():
    mixer = Mixer(cpu, 64, 128, 16, 4, 8, rows=7)
    before, x = [part.clone() for part in mixer.states], torch.randn(7, 40, 64)

    def run(rows, *pieces):
        states = [part[rows].clone() for part in before]
        said = [cpu.mamba(x[rows, begin:end], mixer.norm, mixer.weights, *states) for begin, end in pieces]
        return [torch.cat(said, dim=1), *states]

    whole = run(slice(None), (0, 40))
    for rows, pieces in ((slice(2, 4), [(0, 40)]), (slice(6, 7), [(0, 17), (17, 18), (18, 40)])):
        for found, expected in zip(run(rows, *pieces), whole, strict=True):
            assert torch.equal(found, expected[rows])


@torch.no_grad()
def test_the_public_functions_dispatch():
    weight, x = torch.randn(5, 3), torch.randn(2, 3)
    for backend in ("cpu", "eager", "reference"):
        with force(backend):
            assert_close(packed.linear(x, packed.pack(weight)), x.double() @ weight.double().T, TOLERANCE, backend)
    double = packed.pack(weight.double())  # left to eager
    assert_close(packed.linear(x.double(), double), x.double() @ weight.double().T, 1e-12, "float64")


@COMPILED
def test_what_the_kernel_cannot_read_is_refused():
    weight = packed.pack(torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"packed: x is torch\.bfloat16; the weights were packed as torch\.float32"):
        packed.linear(torch.zeros(1, 4).bfloat16(), weight)
    with pytest.raises(ValueError, match=r"packed: x has 3 columns; the weight has 4"):
        packed.linear(torch.zeros(1, 3), weight)


def test_what_does_not_fit_is_refused():
    weight = packed.pack(torch.randn(5, 4))
    with pytest.raises(ValueError, match="pack: bias has shape"):
        packed.pack(torch.randn(5, 4), torch.zeros(4))
    with pytest.raises(ValueError, match="mlp_block: stream has shape"):
        packed.mlp_block(torch.zeros(1, 4), torch.zeros(2, 4), (torch.ones(4), 1e-5), weight, weight)
    cache, positions = torch.zeros(1, 1, 8, 16), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="attention: 2 tokens a row that has begun, with a window of 8; expected one"):
        packed.attention(torch.zeros(1, 2, 4), None, weight, weight, None, cache, cache, positions, 1, window=8)
    with pytest.raises(ValueError, match=r"pack_mamba: D has shape"):
        packed.pack_mamba(
            weight, torch.zeros(5, 4), torch.zeros(5), weight, weight, torch.zeros(5), torch.zeros(5, 2), torch.zeros(4), weight
        )
    with pytest.raises(ValueError, match=r"mamba: state has shape"):
        packed.mamba(torch.zeros(1, 2, 4), None, None, torch.zeros(1, 3, 5), torch.zeros(2, 5, 2))


@COMPILED
@torch.no_grad()
def test_projections_and_states_of_another_mixer_are_refused():
    """They would be read and written beyond their ends."""
    width, channels, states, taps, rank = 8, 16, 4, 3, 2
    shapes = {"in_proj": (2 * channels, width), "x_proj": (rank + 2 * states, channels), "dt_proj": (channels, rank)}
    shapes |= {"out_proj": (width, channels)}
    rest = torch.zeros(channels, taps), torch.zeros(channels), torch.zeros(channels), -torch.ones(channels, states), torch.zeros(channels)

    def made(**other):
        into, low, dt, out = (packed.pack(torch.zeros(other.get(name, shape))) for name, shape in shapes.items())
        return packed.pack_mamba(into, *rest[:2], low, dt, *rest[2:], out)

    for name, (outputs, inputs) in shapes.items():
        for shape in ((outputs + 1, inputs), (outputs, inputs + 1)):
            with pytest.raises(ValueError, match=r"pack_mamba: (in|x|dt|out)_proj is of"):
                made(**{name: shape})
    mixer, x = made(), torch.zeros(1, 2, width)
    packed.mamba(x, None, mixer, torch.zeros(1, taps - 1, channels), torch.zeros(1, channels, states))
    for past, own in (((1, taps, channels), (1, channels, states)), ((1, taps - 1, channels), (1, channels, states + 1))):
        with pytest.raises(ValueError, match=r"mamba: (taps|state) has shape"):
            packed.mamba(x, None, mixer, torch.zeros(past), torch.zeros(own))
    with pytest.raises(ValueError, match=r"mamba: (taps|state) has shape"):
        packed.mamba(x, None, mixer, torch.zeros(1, taps - 1, 4), torch.zeros(1, 4, states))
