"""The names and layouts of mamba_ssm and causal_conv1d: values and gradients against loops written from their descriptions."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from kernels.compat import causal_conv1d_fn, causal_conv1d_update, selective_scan_fn, selective_state_update

BATCH, CHANNELS, LENGTH, STATES, WIDTH = 2, 6, 11, 5, 4


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).norm() <= tolerance * b.norm() + 1e-12


def scan_inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    values = {
        "u": draw(BATCH, CHANNELS, LENGTH),
        "delta": draw(BATCH, CHANNELS, LENGTH),
        "A": -draw(CHANNELS, STATES).exp(),
        "B": draw(BATCH, STATES, LENGTH),
        "C": draw(BATCH, STATES, LENGTH),
        "D": draw(CHANNELS),
        "z": draw(BATCH, CHANNELS, LENGTH),
        "delta_bias": draw(CHANNELS),
    }
    return {name: value.to(dtype) for name, value in values.items()}


def loop_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """The recurrence channel-major, one position at a time."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    h, out = u.new_zeros(u.shape[0], u.shape[1], A.shape[1]), []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        out.append((h * C[:, None, :, t]).sum(-1))
    y = torch.stack(out, dim=2)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


@pytest.mark.parametrize("extras", [(), ("D",), ("D", "z", "delta_bias")], ids=["plain", "skip", "all"])
def test_scan_and_its_gradients(extras):
    values = {k: v for k, v in scan_inputs().items() if k in {"u", "delta", "A", "B", "C", *extras}}
    softplus = "delta_bias" in extras
    if not softplus:
        values["delta"] = values["delta"].abs()
    mine = {k: v.clone().requires_grad_() for k, v in values.items()}
    wide = {k: v.double().requires_grad_() for k, v in values.items()}
    y, state = selective_scan_fn(**mine, delta_softplus=softplus, return_last_state=True)
    expected, expected_state = loop_scan(**wide, delta_softplus=softplus)
    close(y.double(), expected)
    close(state.double(), expected_state)
    weight, weight_state = torch.randn_like(expected), torch.randn_like(expected_state)
    ((y * weight).sum() + (state * weight_state).sum()).backward()
    ((expected * weight).sum() + (expected_state * weight_state).sum()).backward()
    for name in mine:
        close(mine[name].grad.double(), wide[name].grad)
    assert torch.equal(selective_scan_fn(**values, delta_softplus=softplus), y)  # without the state: y alone


def test_scan_takes_the_one_group_of_four_dimensions():
    values = scan_inputs()
    grouped = values | {"B": values["B"][:, None], "C": values["C"][:, None]}
    assert torch.equal(selective_scan_fn(**grouped, delta_softplus=True), selective_scan_fn(**values, delta_softplus=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"B": torch.zeros(CHANNELS, STATES)}, "B is constant in time"),
        ({"C": torch.zeros(BATCH, 2, STATES, LENGTH)}, "C has 2 groups"),
        ({"A": torch.zeros(CHANNELS, STATES, dtype=torch.complex64)}, "A is complex"),
        ({"B": torch.zeros(BATCH, LENGTH, STATES)}, "B has shape"),
        ({"delta": torch.zeros(BATCH, LENGTH, CHANNELS)}, "delta has shape"),
    ],
)
def test_scan_refuses_what_it_does_not_offer(change, words):
    with pytest.raises(ValueError, match=words):
        selective_scan_fn(**scan_inputs() | change)


def test_state_updates_add_up_to_the_scan():
    v = scan_inputs()
    expected, last = selective_scan_fn(**v, delta_softplus=True, return_last_state=True)
    state = torch.zeros(BATCH, CHANNELS, STATES)
    same = state
    for t in range(LENGTH):
        at = {k: v[k][:, :, t] for k in ("u", "delta", "B", "C", "z")}
        y = selective_state_update(state, at["u"], at["delta"], v["A"], at["B"], at["C"], v["D"], at["z"], v["delta_bias"], True)
        close(y, expected[:, :, t])
    assert state is same
    close(state, last)


def test_state_update_keeps_a_half_precision_state_and_refuses_heads():
    v = scan_inputs()
    state = torch.zeros(BATCH, CHANNELS, STATES, dtype=torch.bfloat16)
    args = [v["u"][..., 0], v["delta"][..., 0], v["A"], v["B"][..., 0], v["C"][..., 0]]
    assert selective_state_update(state, *args, dt_softplus=True).dtype == torch.float32
    assert state.dtype == torch.bfloat16 and state.abs().sum() > 0
    with pytest.raises(ValueError, match="state is"):
        selective_state_update(torch.zeros(BATCH, 2, 3, STATES), *args)


def conv_inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    shapes = {
        "x": (BATCH, CHANNELS, LENGTH),
        "weight": (CHANNELS, WIDTH),
        "bias": (CHANNELS,),
        "initial_states": (BATCH, CHANNELS, WIDTH - 1),
    }
    return {name: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def torch_conv(x, weight, bias=None, initial_states=None, activation=None):
    """torch's own grouped convolution, padded by the state; returns the last W-1 inputs too."""
    before = x.new_zeros(*x.shape[:2], weight.shape[1] - 1) if initial_states is None else initial_states
    padded = torch.cat([before, x], dim=2)
    y = F.conv1d(padded, weight[:, None], bias, groups=len(weight))
    return (y if activation is None else F.silu(y)), padded[:, :, -(weight.shape[1] - 1) :]


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("names", [("x", "weight"), ("x", "weight", "bias", "initial_states")], ids=["plain", "all"])
def test_convolution_and_its_gradients(names, activation):
    values = {name: value for name, value in conv_inputs().items() if name in names}
    mine = {k: v.clone().requires_grad_() for k, v in values.items()}
    wide = {k: v.double().requires_grad_() for k, v in values.items()}
    y, final = causal_conv1d_fn(**mine, return_final_states=True, activation=activation)
    expected, expected_final = torch_conv(**wide, activation=activation)
    close(y.double(), expected)
    close(final.double(), expected_final, 0)
    weight, weight_final = torch.randn_like(expected), torch.randn_like(expected_final)
    ((y * weight).sum() + (final * weight_final).sum()).backward()
    ((expected * weight).sum() + (expected_final * weight_final).sum()).backward()
    for name in mine:
        close(mine[name].grad.double(), wide[name].grad)


def test_convolution_of_packed_sequences_and_the_given_output():
    v = conv_inputs()
    seq_idx = torch.tensor([[0] * 3 + [1] * 8, [0] * 5 + [1] * 1 + [2] * 5], dtype=torch.int32)
    y = causal_conv1d_fn(v["x"], v["weight"], v["bias"], seq_idx=seq_idx, activation="silu")
    for row, bounds in enumerate(((0, 3, 11), (0, 5, 6, 11))):
        for start, end in itertools.pairwise(bounds):
            alone, _ = torch_conv(v["x"][row : row + 1, :, start:end], v["weight"], v["bias"], activation="silu")
            close(y[row : row + 1, :, start:end], alone)
    padded = seq_idx.clone()
    padded[:, -3:] = -1
    z = causal_conv1d_fn(v["x"], v["weight"], v["bias"], seq_idx=padded, activation="silu")
    assert torch.equal(z[:, :, :-3], y[:, :, :-3]) and not z[:, :, -3:].any()
    out = torch.empty(BATCH, CHANNELS, WIDTH - 1)
    _, final = causal_conv1d_fn(v["x"], v["weight"], return_final_states=True, final_states_out=out)
    assert final is out and torch.equal(out, v["x"][:, :, -3:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"initial_states": torch.zeros(BATCH, CHANNELS, WIDTH)}, "initial_states has shape"),
        ({"seq_idx": torch.zeros(BATCH, LENGTH, dtype=torch.int32)}, "seq_idx excludes"),
        ({"final_states_out": torch.zeros(BATCH, CHANNELS, WIDTH - 1)}, "return_final_states is False"),
        ({"x": torch.zeros(BATCH, LENGTH, CHANNELS)}, "weight has shape|initial_states has shape"),
    ],
)
def test_convolution_refuses_what_it_does_not_offer(change, words):
    with pytest.raises(ValueError, match=words):
        causal_conv1d_fn(**conv_inputs() | change)


@pytest.mark.parametrize("columns", [WIDTH - 1, WIDTH, WIDTH + 3])
@pytest.mark.parametrize("chunk", [None, 1, 3, 7])
def test_convolution_updates_add_up(columns, chunk):
    """chunk None: x without a time dimension. The state's redundant columns are older inputs."""
    v = conv_inputs()
    expected, _ = torch_conv(v["x"], v["weight"], v["bias"], activation="silu")
    state = torch.zeros(BATCH, CHANNELS, columns)
    pieces = []
    for start in range(0, LENGTH, chunk or 1):
        x = v["x"][:, :, start] if chunk is None else v["x"][:, :, start : start + chunk]
        y = causal_conv1d_update(x, state, v["weight"], v["bias"], "silu")
        assert y.shape == x.shape
        pieces.append(y[:, :, None] if chunk is None else y)
    close(torch.cat(pieces, dim=2), expected)
    assert torch.equal(state, v["x"][:, :, -columns:])


@pytest.mark.parametrize("columns", [WIDTH - 1, WIDTH, WIDTH + 3])
@pytest.mark.parametrize("chunk", [1, 2, 9])
def test_convolution_updates_of_a_ring_whose_rows_stand_at_different_places(columns, chunk):
    v = conv_inputs()
    expected, _ = torch_conv(v["x"], v["weight"], v["bias"])
    state, seen = torch.zeros(BATCH, CHANNELS, columns), torch.tensor([0, 5], dtype=torch.int32)
    pieces = []
    for start in range(0, LENGTH, chunk):
        x = v["x"][:, :, start : start + chunk]
        pieces.append(causal_conv1d_update(x, state, v["weight"], v["bias"], cache_seqlens=seen))
        seen = seen + x.shape[2]
    close(torch.cat(pieces, dim=2), expected)


def test_convolution_update_refuses_a_short_state():
    v = conv_inputs()
    with pytest.raises(ValueError, match="at least W-1 = 3"):
        causal_conv1d_update(v["x"][:, :, 0], torch.zeros(BATCH, CHANNELS, 2), v["weight"])


def test_the_functions_together_are_transformers_mixer():
    """A Mamba mixer written with these names, against transformers' slow path: output and the gradient of every weight."""
    transformers = pytest.importorskip("transformers", reason="the parity oracle; comes with the dev extra")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=16, state_size=STATES, time_step_rank=3, use_bias=False)
    theirs = MambaMixer(config, layer_idx=0)
    torch.nn.init.uniform_(theirs.dt_proj.bias, -3, 0)
    w = {name: p.detach().clone().requires_grad_() for name, p in theirs.named_parameters()}
    x = torch.randn(2, 13, 16)
    u, z = (x @ w["in_proj.weight"].T).transpose(1, 2).chunk(2, dim=1)
    u = causal_conv1d_fn(u, w["conv1d.weight"][:, 0], w["conv1d.bias"], activation="silu")
    dt, b, c = (u.transpose(1, 2) @ w["x_proj.weight"].T).split([3, STATES, STATES], dim=-1)
    delta = (dt @ w["dt_proj.weight"].T).transpose(1, 2)
    a = -w["A_log"].exp()
    y = selective_scan_fn(u, delta, a, b.transpose(1, 2), c.transpose(1, 2), w["D"], z, w["dt_proj.bias"], delta_softplus=True)
    y = y.transpose(1, 2) @ w["out_proj.weight"].T
    expected = theirs(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    close(y, expected)
    cotangent = torch.randn_like(y)
    (y * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    for name, parameter in theirs.named_parameters():
        close(w[name].grad, parameter.grad)
