"""What holds for every model: packing, roles, wrapped projections, RoPE, checkpointing, sizes."""

import copy
import inspect
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from components.contracts import ROLES, Batch, Model, RopeRegime, RopeSpec, UserError
from components.rope.rules import Linear, NoRescaling, YaRN


def on_meta(make_model, name, size, **changes):
    with torch.device("meta"):
        return make_model(name, size, **changes)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "size", "parameters"),
    [("samba", "421m", 421_793_280), ("samba", "1b3", 1_330_207_488), ("phi4mini", "3b8", 3_836_021_760)],
)
def test_parameter_counts_of_the_papers(make_model, name, size, parameters):
    assert count(on_meta(make_model, name, size)) == parameters


def test_untied_counts(make_model):
    assert count(on_meta(make_model, "samba", "421m", tie_embeddings=False)) == 470_945_280


def test_sizes_are_comparable(make_model, model_name):
    assert count(on_meta(make_model, model_name, "test", vocab_size=320)) < 100_000
    for size, vocab, low, high in (("tiny", 2048, 2e6, 3e6), ("small", 8192, 27e6, 34e6)):
        samba, this = (count(on_meta(make_model, name, size, vocab_size=vocab)) for name in ("samba", model_name))
        assert low < this < high and abs(this / samba - 1) < 0.1


def test_keys_are_constructor_arguments(make_model, model_config, model_name):
    expected = set(inspect.signature(type(make_model(model_name)).__init__).parameters) - {"self", "rope"}
    assert set(model_config(model_name, "test")) - {"_target_"} == expected


def test_contract(model, random_ids):
    assert isinstance(model, Model)
    out = model(Batch(random_ids(2, 7)))
    assert out.hidden.shape == (2, 7, 48) and out.aux_losses == {}
    assert model.logits(out.hidden).shape == (2, 7, model.vocab_size) == (2, 7, len(model.head_weight))
    assert model.head_weight is model.embed_tokens.weight


def test_untied_head(make_model, model_name, random_ids):
    model = make_model(model_name, tie_embeddings=False)
    assert model.head_weight is model.lm_head.weight and model.roles()["lm_head.weight"] == "head"
    hidden = model(Batch(random_ids(1, 3))).hidden
    torch.testing.assert_close(model.logits(hidden), hidden @ model.head_weight.T)


def test_causal(model, full_logits, random_ids):
    ids = random_ids(1, 40)
    other = ids.clone()
    other[0, 25] += 1
    difference = (full_logits(model, ids) - full_logits(model, other)).abs().amax(-1)[0]
    assert difference[:25].max() == 0 and difference[25:].min() > 1e-6


@pytest.mark.parametrize("lengths", [[20, 1, 17, 26], [1, 1, 1, 40], [33, 31]])
def test_packed_documents_equal_documents_alone(model, lengths, full_logits, random_ids, close):
    ids = random_ids(2, sum(lengths))
    segments = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    packed = full_logits(model, ids, segment_ids=segments, position_ids=positions)
    shifted = full_logits(model, ids, segment_ids=segments)  # rotary positions are relative: without a restart the same
    for piece, same, alone in zip(packed.split(lengths, 1), shifted.split(lengths, 1), ids.split(lengths, 1)):
        close(piece, full_logits(model, alone))
        close(same, full_logits(model, alone))


def test_rows_of_a_batch_are_packed_differently(model, full_logits, random_ids, close):
    ids = random_ids(2, 30)
    segments = torch.zeros(2, 30, dtype=torch.int32)
    segments[0, 12:] = 1
    segments[1, 25:] = 1
    packed = full_logits(model, ids, segment_ids=segments)
    close(packed[0, 12:], full_logits(model, ids[:1, 12:])[0])
    close(packed[1, 25:], full_logits(model, ids[1:, 25:])[0])


def test_every_parameter_has_a_role(make_model, model_name):
    model = make_model(model_name, tie_embeddings=False)
    roles = model.roles()
    assert list(roles) == [name for name, _ in model.named_parameters()]
    assert set(roles.values()) <= set(ROLES)
    model.layers[0].mystery = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"layers\.0\.mystery\.weight"):
        model.roles()


def test_roles_by_hand(make_model):
    roles = make_model("samba").roles()
    mixer = {name.removeprefix("layers.0.mixer."): role for name, role in roles.items() if name.startswith("layers.0.mixer.")}
    assert mixer == {
        "in_proj.weight": "in_proj", "conv_weight": "conv", "conv_bias": "conv", "x_proj.weight": "x_proj", "dt_proj.weight": "dt",
        "dt_bias": "dt", "A_log": "ssm", "D": "ssm", "out_proj.weight": "out_proj",
    }  # fmt: skip
    attention = {name.removeprefix("layers.1."): role for name, role in roles.items() if name.startswith("layers.1.")}
    assert attention == {
        "mixer_norm.weight": "norm", "mixer.qkv_proj.weight": "qkv", "mixer.o_proj.weight": "o", "mlp_norm.weight": "norm",
        "mlp.gate_up_proj.weight": "gate_up", "mlp.down_proj.weight": "down",
    }  # fmt: skip
    assert roles["embed_tokens.weight"] == "embedding" and roles["norm.weight"] == "norm"


def test_fused_splits_cover_their_rows(model):
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    splits = model.fused_splits()
    assert all(sum(rows) == shapes[name][0] for name, rows in splits.items())
    fused = {name for name, role in model.roles().items() if role in ("qkv", "gate_up", "in_proj", "x_proj")}
    assert set(splits) == fused


def test_what_a_wrapper_adds_has_the_role_adapter(make_model, model_name):
    """Without knowing the wrapper: any module beside a base_layer, at any depth; what it wraps keeps its role."""
    model = make_model(model_name, tie_embeddings=False)
    plain = model.roles()
    wrapped = linears(model)
    for name in wrapped:
        parent, _, leaf = name.rpartition(".")
        wrapper = Perturbed(model.get_submodule(name))
        wrapper.lora_A, wrapper.scale = nn.Linear(2, 2, bias=False), nn.Parameter(torch.ones(1))
        setattr(model.get_submodule(parent), leaf, wrapper)
    roles = model.roles()
    assert {name for name, role in roles.items() if role == "adapter"} == {f"{n}.{p}" for n in wrapped for p in ("lora_A.weight", "scale")}
    assert {name.replace(".base_layer", ""): role for name, role in roles.items() if role != "adapter"} == plain


class Perturbed(nn.Module):
    """A wrapper as an adapter makes it: the base layer stays a module inside."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        y = self.base_layer(x)
        return y + 0.1 * torch.sin(torch.arange(y.shape[-1]))


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("mode", ["forward", "prefill and step"])
def test_a_wrapper_round_any_linear_changes_the_output(make_model, model_name, mode, random_ids):
    ids = random_ids(1, 5)

    def output(model):
        with torch.no_grad():
            state = model.new_state(1, 8) if mode != "forward" else None
            pieces = [ids] if state is None else ids.split([3, 1, 1], dim=1)
            return model.logits(torch.cat([model(Batch(piece), state).hidden for piece in pieces], dim=1))

    reference = make_model(model_name, tie_embeddings=False)
    plain, names = output(reference), linears(reference)
    assert len(names) >= 9
    for name in names:
        model = copy.deepcopy(reference)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Perturbed(model.get_submodule(name)))
        assert (output(model) - plain).abs().max() > 1e-6, name
        assert model.roles()[f"{name}.base_layer.weight"] == reference.roles()[f"{name}.weight"]


def loss_and_gradients(model, ids):
    model.zero_grad()
    loss = F.cross_entropy(model.logits(model(Batch(ids[:, :-1])).hidden).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_activation_checkpointing_changes_nothing(model, random_ids):
    model.train()
    ids = random_ids(2, 30)
    loss, gradients = loss_and_gradients(model, ids)
    calls = []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing = True
    again, regrown = loss_and_gradients(model, ids)
    assert len(calls) == 2  # once more in the backward
    torch.testing.assert_close(again, loss, rtol=0, atol=0)
    torch.testing.assert_close(regrown, gradients, rtol=0, atol=0)


def test_every_parameter_learns(model, random_ids):
    _, gradients = loss_and_gradients(model, random_ids(2, 40))
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients.values())


def test_autocast_keeps_the_residual_stream_in_fp32(model, model_name, random_ids, full_logits, close):
    streams = []
    for block in model.layers:
        block.register_forward_hook(lambda module, args, out: streams.append(out.dtype))
    ids = random_ids(2, 40)
    plain = full_logits(model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = full_logits(model, ids)
    assert set(streams) == {torch.float32}
    # bf16 has 2^-9 a rounding; measured: samba 3.5e-2, phi4mini 3.9e-3
    close(mixed.float(), plain, relative={"samba": 5e-2, "phi4mini": 8e-3}[model_name])


def test_float64_model_is_more_exact(make_model, model_name, full_logits, random_ids):
    """fp32 differs from float64 by rounding only, so nothing inside is stuck in a lower precision than it says."""
    model = make_model(model_name).eval()
    ids = random_ids(1, 40)
    low = full_logits(model, ids)
    high = full_logits(model.double(), ids)
    assert high.dtype == torch.float64
    assert (low - high).abs().max() <= 1e-5 * high.abs().max()


def test_rope_rescaling_changes_a_full_attention_model(make_model, full_logits, random_ids):
    ids = random_ids(1, 40)
    plain, yarn = (full_logits(make_model("phi4mini", rope=rope), ids) for rope in (NoRescaling(), YaRN(4.0, 32.0, 1.0, True)))
    assert (plain - yarn).abs().max() > 1e-4
    model = make_model("phi4mini")
    model.set_rope(YaRN(4.0, 32.0, 1.0, True).spec(12, 1e4, 64))
    torch.testing.assert_close(full_logits(model, ids), yarn, rtol=0, atol=0)


def test_rope_rescaling_is_a_no_op_within_an_unchanged_window_and_says_so(make_model, full_logits, random_ids, caplog):
    ids = random_ids(1, 40)
    with caplog.at_level(logging.WARNING):
        rescaled = make_model("samba", rope=Linear(4.0))
    assert "model.window=16" in caplog.text
    torch.testing.assert_close(full_logits(rescaled, ids), full_logits(make_model("samba"), ids), rtol=0, atol=0)
    wide = full_logits(make_model("samba", rope=Linear(4.0), window=65), ids)
    assert (wide - full_logits(make_model("samba", window=65), ids)).abs().max() > 1e-5


def test_position_none_knows_no_order_within_one_attention_layer(make_model, full_logits, random_ids, close):
    """Without positions a single attention layer cannot tell the order of the tokens before the last."""
    ids = random_ids(1, 12)
    swapped = ids[:, [*range(10, -1, -1), 11]]
    nope = make_model("phi4mini", num_layers=1, position="none")
    close(full_logits(nope, ids)[:, -1], full_logits(nope, swapped)[:, -1])
    rope = make_model("phi4mini", num_layers=1)
    assert (full_logits(rope, ids)[:, -1] - full_logits(rope, swapped)[:, -1]).abs().max() > 1e-5
    nope.set_rope(NoRescaling().spec(12, 1e4, 64))
    assert nope.rope_spec is None


def test_set_rope_refuses_what_does_not_fit(model):
    rotary = model.rope_spec.rotary_dim
    with pytest.raises(UserError, match=r"rope\.rotary_dim"):
        model.set_rope(NoRescaling().spec(rotary + 2, 1e4, 64))
    broken = RopeSpec(rotary, regimes=(RopeRegime((2.0,)),))
    with pytest.raises(UserError, match=r"rope\.factors: 1 values"):
        model.set_rope(broken)


def test_flops_by_hand(make_model):
    """samba test: every matrix once at 2 a weight, attention over windows, convolution and scan."""
    model = make_model("samba")
    mamba = 2 * (48 * 192 + 96 * (3 + 16) + 3 * 96 + 96 * 48) + 2 * 4 * 96 + 7 * 96 * 8
    pairs = sum(min(i + 1, 16) for i in range(64)) / 64
    attention = 2 * (48 * 128 + 64 * 48) + 4 * 4 * 16 * pairs
    mlp = 2 * 3 * 48 * 128
    assert model.forward_flops(64) == pytest.approx(mamba + attention + 2 * mlp + 2 * 320 * 48, rel=1e-12)
    full = make_model("phi4mini")
    assert full.forward_flops(64) - full.forward_flops(1) == pytest.approx(2 * 4 * 4 * 16 * (65 / 2 - 1), rel=1e-12)


def test_same_seed_same_weights(make_model, model_name):
    a, b, c = (make_model(model_name, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["embed_tokens.weight"], c["embed_tokens.weight"])


def uniform_check(weight, bound):
    """U(-bound, bound): every value inside, the standard deviation within 3 % of bound / sqrt 3."""
    assert weight.abs().max() <= bound * (1 + 1e-6)
    assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_samba_initialisation(make_model):
    """Sheet section 4.4, with 2 layers = 4 sublayers."""
    model = make_model("samba", hidden_size=256, intermediate_size=512, state_size=16).requires_grad_(False)
    assert model.embed_tokens.weight.std() == pytest.approx(0.02, rel=0.03)
    mamba, attention = model.layers[0].mixer, model.layers[1].mixer
    uniform_check(mamba.in_proj.weight, 256**-0.5)
    uniform_check(mamba.x_proj.weight, 512**-0.5)
    uniform_check(mamba.dt_proj.weight, 16**-0.5)
    uniform_check(attention.qkv_proj.weight, 256**-0.5)
    uniform_check(mamba.out_proj.weight, 512**-0.5 / 2)
    uniform_check(attention.o_proj.weight, 64**-0.5 / 2)
    uniform_check(model.layers[0].mlp.gate_up_proj.weight, 256**-0.5)
    uniform_check(model.layers[1].mlp.down_proj.weight, 512**-0.5 / 2)
    uniform_check(mamba.conv_weight, 0.5)
    assert mamba.conv_bias.abs().max() <= 0.5 and mamba.conv_bias.std() > 0.2
    dt = F.softplus(mamba.dt_bias)
    assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 0.1 * 1.001
    assert dt.log().mean() == pytest.approx((math.log(1e-3) + math.log(0.1)) / 2, abs=0.2)  # log-uniform: mean of 512 draws, sd 0.06
    torch.testing.assert_close(mamba.A_log.exp(), torch.arange(1.0, 17.0).expand(512, 16), rtol=1e-6, atol=0)
    assert (mamba.D == 1).all() and (model.norm.weight == 1).all()


def test_phi4mini_initialisation(make_model):
    model = make_model("phi4mini", hidden_size=256).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            assert parameter.std() == pytest.approx(0.02, rel=0.03), name
        else:
            assert (parameter == 1).all(), name


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("samba", {"num_kv_heads": 3}, r"model\.num_kv_heads: 3; allowed are the divisors of model\.num_heads=4; try [24]"),
        ("samba", {"window": 0}, r"model\.window: 0"),
        ("samba", {"vocab_size": None}, r"model\.vocab_size: null"),
        ("samba", {"position": "nope"}, r"model\.position: 'nope'; allowed are rope, none; did you mean rope"),
        ("samba", {"layer_pattern": ["mamba", "atention"]}, r"model\.layer_pattern: 'atention'.*did you mean attention"),
        ("samba", {"layer_pattern": []}, r"model\.layer_pattern"),
        ("samba", {"state_size": 0}, r"model\.state_size: 0"),
        ("samba", {"dt_rank": 0}, r"model\.dt_rank: 0"),
        ("samba", {"head_dim": 15}, "model.head_dim"),
        ("phi4mini", {"num_layers": 0}, r"model\.num_layers: 0"),
        ("phi4mini", {"head_dim": 20}, r"model\.partial_rotary_factor: 0\.75 of model\.head_dim=20 gives 15.*0\.7"),
        ("phi4mini", {"partial_rotary_factor": 1.5}, r"model\.partial_rotary_factor"),
        ("phi4mini", {"max_length": -1}, r"model\.max_length"),
    ],
)
def test_mistakes_are_named(make_model, name, changes, message):
    with pytest.raises(UserError, match=message) as error:
        make_model(name, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_compiled_model_equals_itself(make_model, model_name, random_ids, close):
    """Traced by dynamo without a code generator: training forward with packing, and steps, which stay uncompiled."""
    model = make_model(model_name)
    ids, segments = random_ids(2, 40), (torch.arange(40) > 20).int().expand(2, -1)
    expected = model(Batch(ids, segment_ids=segments)).hidden
    model.compile(backend="eager")
    close(model(Batch(ids, segment_ids=segments)).hidden, expected)
    state = model.new_state(2, 40)
    with torch.no_grad():
        stepped = torch.cat([model(Batch(piece), state).hidden for piece in ids[:, :21].split([15, *[1] * 6], dim=1)], dim=1)
    close(stepped, expected[:, :21])
