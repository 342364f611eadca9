"""Whole MambaForCausalLM models both ways: logits, greedy decoding with a cache, strict keys, and the files of transformers itself."""

import json

import pytest
import torch

from components.contracts import Batch, UserError
from components.interop import layouts, read
from components.interop.mamba_transformers import from_transformers, mixer_from_transformers, mixer_to_transformers, to_transformers
from components.models.samba import MambaMixer
from tests.components.interop.models import config, logits, model

transformers = pytest.importorskip("transformers", reason="the parity oracle; comes with the dev extra")
IDS = torch.randint(96, (2, 23), generator=torch.Generator().manual_seed(5))
LAYOUT = layouts()["transformers"]


def theirs(**changes):
    torch.manual_seed(3)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 6, "layer_norm_epsilon": 1e-5} | changes
    built = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", "mixer.D")):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("dt_proj.bias"):
                parameter.uniform_(-4, 0)
            elif name.endswith("out_proj.weight"):
                parameter.uniform_(-1, 1)  # else a tied head repeats the last token for ever
    return built


def ours(built, about=None):
    w = built.state_dict()
    numbers = config() | LAYOUT.infer(w, built.config.to_dict() if about is None else about, {})
    return model(numbers, from_transformers(w, numbers)), numbers


def greedy(built, prompt, tokens):
    """Argmax decoding with our cached state, one token at a time after the prompt."""
    state, given, found = built.new_state(1, 64), prompt, []
    with torch.no_grad():
        for _ in range(tokens):
            found.append(int(built.logits(built(Batch(input_ids=given), state).hidden)[0, -1].argmax()))
            given = torch.tensor([found[-1:]])
    return found


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"state_size": 5, "conv_kernel": 3, "expand": 3, "time_step_rank": 7, "layer_norm_epsilon": 1e-3}],
    ids=["tied", "untied", "odd-sizes"],
)
def test_their_model_gives_its_logits_and_its_greedy_text(changes):
    built = theirs(**changes)
    mine, numbers = ours(built)
    with torch.no_grad():
        expected = built(IDS).logits
    assert (logits(mine, IDS) - expected).norm() <= 1e-5 * expected.norm()
    prompt = IDS[:1, :7]
    written = built.generate(prompt, max_new_tokens=20, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0)
    text = written[0, 7:].tolist()
    assert len(set(text)) > 5 and greedy(mine, prompt, 20) == text
    back = to_transformers(mine.state_dict(), numbers)
    assert back.keys() == built.state_dict().keys() and all(torch.equal(back[name], w) for name, w in built.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["one file", "shards"])
def test_our_model_is_read_by_from_pretrained(tmp_path, tied, shard_bytes):
    numbers = config(layer_pattern=["mamba"], mlp_pattern=[False], hidden_size=32, tie_embeddings=tied)
    mine = model(numbers)
    w = to_transformers(mine.state_dict(), numbers)
    LAYOUT.write(tmp_path, w, numbers, 5, shard_bytes)
    assert ((tmp_path / "model.safetensors.index.json").is_file()) == (shard_bytes == 20_000)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 5
    built, report = transformers.MambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    built.load_state_dict(w, strict=True)
    with torch.no_grad():
        expected = built.eval()(IDS).logits
    assert (logits(mine, IDS) - expected).norm() <= 1e-5 * expected.norm()
    source = read(tmp_path)
    found = config() | LAYOUT.infer(source.tensors, source.about, {})
    assert torch.equal(logits(model(found, from_transformers(source.tensors, found), seed=1), IDS), logits(mine, IDS))


def test_a_folder_that_transformers_wrote_is_read(tmp_path):
    built = theirs()
    built.save_pretrained(tmp_path, max_shard_size="20KB")
    source = read(tmp_path)
    numbers = config() | LAYOUT.infer(source.tensors, source.about, {})
    assert torch.equal(logits(model(numbers, from_transformers(source.tensors, numbers)), IDS), logits(ours(built)[0], IDS))


def test_the_name_that_mamba_ssm_gives_the_embedding():
    """mamba_ssm's own config.json too, whose keys are others."""
    built = theirs()
    w = {name.replace("embeddings", "embedding"): tensor for name, tensor in built.state_dict().items()}
    numbers = config() | LAYOUT.infer(w, {"d_model": 32, "n_layer": 3, "ssm_cfg": {}}, {})
    assert torch.equal(logits(model(numbers, from_transformers(w, numbers)), IDS), logits(ours(built)[0], IDS))
    assert LAYOUT.canonical(w).keys() == built.state_dict().keys()


def test_single_mixers_copy_one_to_one():
    built = theirs()
    theirs_mixer = built.backbone.layers[1].mixer
    numbers = config(hidden_size=32)
    mixer = MambaMixer(32, 6, 4, 2, None)
    mixer.load_state_dict(mixer_from_transformers(theirs_mixer.state_dict(), numbers))
    back = mixer_to_transformers(mixer.state_dict(), numbers)
    assert back.keys() == theirs_mixer.state_dict().keys()
    x = torch.randn(1, 9, 32)
    expected = theirs_mixer(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert (mixer(x) - expected).norm() <= 1e-5 * expected.norm()
    with pytest.raises(UserError, match=r"missing tensors: A_log"):
        mixer_from_transformers({k: v for k, v in theirs_mixer.state_dict().items() if k != "A_log"}, numbers)


@pytest.mark.parametrize(
    ("about", "word"),
    [
        ({"model_type": "falcon_mamba"}, "'falcon_mamba'"),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"model_type": "mamba", "vocab_size": 7}, "=7"),
    ],
)
def test_models_that_compute_something_else_are_refused(about, word):
    with pytest.raises(UserError, match=word):
        ours(theirs(), about)


def test_biases_and_other_mixers_are_refused():
    with pytest.raises(UserError, match=r"unknown tensors: .*layers\.0\.mixer\.in_proj\.bias"):
        ours(theirs(use_bias=True))
    second = {"backbone.embedding.weight": torch.zeros(4, 4), "backbone.layers.0.mixer.A_log": torch.zeros(2)}
    with pytest.raises(UserError, match=r"A_log: has shape \(2,\), expected 2 dimensions"):
        LAYOUT.infer(second, {}, {})
    numbers = config()
    with pytest.raises(UserError, match="cannot be written as transformers"):
        to_transformers(model(numbers).state_dict(), numbers)
