"""The native engine against the plain definition: an uncached forward over the whole sequence, one row at a time."""

from __future__ import annotations

import inspect
import re
import warnings
from dataclasses import replace

import pytest
import torch
import yaml
from torch import Tensor, nn

from components.contracts import Batch, ModelOutput, SamplingParams, UserError
from components.data.tokenizers import bytes_tokenizer
from components.decode_state import DecodeState
from components.decoding.graph_step import StaticStep
from components.decoding.sampling import sample_token, uniforms
from components.layer_state import RecurrentState
from framework.build import build_model, compose
from framework.engines.native import NativeEngine
from framework.overrides import CONF

TOKENIZER = bytes_tokenizer()
EOT = TOKENIZER.eot_id
PROMPTS = [[EOT, *text.encode()] for text in ("", "a", "hello", "hello", "the quick brown fox", "world", "x" * 40)]


class MeanModel(nn.Module):
    """Smallest model with a memory: hidden_t = tanh(W [e_t, mean of e so far in the segment]); e is scaled from `switch_at` tokens on."""

    def __init__(self, vocab_size: int = 320, size: int = 24, switch_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vocab_size, self.switch_at = vocab_size, switch_at
        self.embed = nn.Embedding(vocab_size, size)
        self.mix = nn.Linear(2 * size, size)
        self.head = nn.Linear(size, vocab_size)
        self.tokens_read = 0

    def forward(self, batch: Batch, state: DecodeState | None = None) -> ModelOutput:
        self.tokens_read += batch.input_ids.numel()
        x = self.embed(batch.input_ids)  # (B, T, D)
        if state is None:
            segments = batch.segment_ids if batch.segment_ids is not None else torch.zeros_like(batch.input_ids)
            same = (segments[:, :, None] == segments[:, None]).tril().float()  # (B, T, T)
            x = x * self._scale(batch.input_ids.shape[1])
            return self._out(x, same @ x / same.sum(-1, keepdim=True))
        step = state.begin(*batch.input_ids.shape)
        (memory,) = state.layers
        x = x * torch.where(step.regime.bool(), 2.0, 1.0)[:, None, None]
        total = memory.ssm[:, :, 0].unsqueeze(1) + x.cumsum(1)
        memory.update(memory.conv, total[:, -1, :, None])
        state.finish(x.shape[1])
        return self._out(x, total / (step.positions + 1)[..., None])

    def _scale(self, length: int) -> float:
        return 2.0 if self.switch_at is not None and length >= self.switch_at else 1.0

    def _out(self, x: Tensor, mean: Tensor) -> ModelOutput:
        return ModelOutput(torch.tanh(self.mix(torch.cat([x, mean], dim=-1))))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden) * 8

    def new_state(self, batch_size: int, max_length: int, dtype: torch.dtype = torch.float32) -> DecodeState:
        """Sums of e, one row each."""
        memory = RecurrentState.empty(batch_size, 0, self.embed.embedding_dim, 1, dtype, "cpu")
        return DecodeState.empty([memory], batch_size, "cpu", () if self.switch_at is None else (self.switch_at - 1,))


def full_logits(model: nn.Module, ids: list[int]) -> Tensor:
    """(T, V) by one uncached forward."""
    with torch.no_grad():
        return model.logits(model(Batch(torch.tensor([ids]))).hidden[0]).float()


def uncached(model: nn.Module, prompt: list[int], params: SamplingParams, index: int, stop: set[int], blocked: Tensor) -> list[int]:
    """The definition of decoding: a whole forward for every token."""
    ids = list(prompt)
    for position in range(params.max_new_tokens):
        token, _ = sample_token(full_logits(model, ids)[-1:], params, uniforms(params.seed, [index], [position]), blocked)
        ids.append(token.item())
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return MeanModel().eval()


def engine(model: nn.Module, **options) -> NativeEngine:
    return NativeEngine(model, TOKENIZER, **options)


GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)
SAMPLE = SamplingParams(max_new_tokens=24, temperature=0.9, top_p=0.95, seed=5)


@pytest.mark.parametrize("params", [GREEDY, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("options", [{}, {"max_batch": 2}, {"max_batch": 1, "prefill_chunk": 3}], ids=str)
def test_generation_equals_the_uncached_definition(model, params, options):
    native = engine(model, **options)
    for index, completion in enumerate(native.generate(PROMPTS, params)):
        assert completion.token_ids == uncached(model, PROMPTS[index], params, index, native.stop_ids, native._blocked)


@pytest.mark.parametrize("params", [GREEDY, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("name", ["samba", "phi4mini"])
def test_real_models_equal_the_uncached_definition(name, params):
    """Rows come and go at different lengths, below and above the window, in a batch of 3; scores agree as well."""
    torch.manual_seed(0)
    config = compose("train", [f"model={name}", "model/size=test", "data.seq_len=64"])
    real = build_model(config, TOKENIZER.vocab_size).eval()
    with torch.no_grad():
        for parameter in real.parameters():  # logits far enough apart that rounding cannot change a choice
            parameter.mul_(1.0 if parameter.dim() == 1 else 2.0)
    params = replace(params, max_new_tokens=12)
    prompts = [*PROMPTS[:4], [EOT, *b"a prompt that is a good deal longer than the window of the smallest model"]]
    native = engine(real, max_batch=3, prefill_chunk=10)
    for index, completion in enumerate(native.generate(prompts, params)):
        ids, begin = prompts[index] + completion.token_ids, len(prompts[index])
        draws = uniforms(params.seed, [index] * len(completion.token_ids), list(range(len(completion.token_ids))))
        chosen, logprobs = sample_token(full_logits(real, ids)[begin - 1 : -1], params, draws, native._blocked)
        assert completion.token_ids == chosen.tolist()
        assert torch.allclose(torch.tensor(completion.logprobs), logprobs, rtol=1e-4, atol=1e-4)  # fp32 logits of size 10 to 100
        assert torch.allclose(native.score([ids])[0][begin - 1 :], logprobs, rtol=1e-4, atol=1e-4)


def test_rows_of_a_real_model_that_join_late_have_room():
    """A cache without a window is as long as the longest prompt needs; rows that join when that one is far along need no more."""
    torch.manual_seed(0)
    real = build_model(compose("train", ["model=phi4mini", "model/size=test", "data.seq_len=64"]), TOKENIZER.vocab_size).eval()
    prompts = [[EOT, *b"much longer than all the others"], *([EOT, *f"{n}".encode()] for n in range(20))]
    native = engine(real, max_batch=3)
    native.stop_ids = set(range(0, real.vocab_size, 20))  # rows end at random, so that others join at all times
    together = native.generate(prompts, SAMPLE)
    assert {completion.finish_reason for completion in together} == {"stop", "length"}
    wide = engine(real, max_batch=32)
    wide.stop_ids = native.stop_ids
    assert [c.token_ids for c in together] == [c.token_ids for c in wide.generate(prompts, SAMPLE)]


@pytest.mark.parametrize("params", [GREEDY, SAMPLE], ids=["greedy", "sample"])
@pytest.mark.parametrize("changes", [[], ["model=phi4mini", "model.window=16"]], ids=["hybrid", "window"])
def test_static_steps_say_what_plain_steps_say(changes, params, monkeypatch):
    """Rows end and join at random, so that states are loaded into the static buffers again and again."""
    torch.manual_seed(0)
    real = build_model(compose("train", [*changes, "model/size=test", "data.seq_len=64"]), TOKENIZER.vocab_size).eval()
    prompts = [[EOT, *b"longer than all of the others"], *([EOT, *f"{n}".encode()] for n in range(10))]
    used, found = [], {}
    run = StaticStep.__call__
    monkeypatch.setattr(StaticStep, "__call__", lambda step, ids: used.append((step.capacity, len(ids))) or run(step, ids))
    for option in ("always", "never", "auto"):
        used.clear()
        native = engine(real, max_batch=5, static_steps=option)
        native.stop_ids = set(range(0, real.vocab_size, 12))
        found[option] = native.generate(prompts, params)
        if option == "always":
            assert (8, 5) in used and len({capacity for capacity, _ in used}) > 1
        else:
            assert not used  # auto: on a CUDA device, which there is not here
    assert [c.token_ids for c in found["always"]] == [c.token_ids for c in found["never"]] == [c.token_ids for c in found["auto"]]
    for a, b in zip(found["always"], found["never"], strict=True):
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=1e-4, atol=1e-4)


def test_static_steps_of_a_growing_state_fall_back_and_say_so_once(caplog):
    real = build_model(compose("train", ["model=phi4mini", "model/size=test", "data.seq_len=64"]), TOKENIZER.vocab_size).eval()
    native = engine(real, static_steps="always")
    with caplog.at_level("WARNING"):
        found = [native.generate(PROMPTS[:3], GREEDY) for _ in range(2)]
    assert found[0] == found[1] == engine(real).generate(PROMPTS[:3], GREEDY)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["engine.static_steps: the decode state of Phi4Mini grows with the length; its steps run without CUDA graphs"]


def test_a_row_does_not_depend_on_what_comes_after_it_or_on_the_batch_size(model):
    alone = engine(model).generate(PROMPTS[:1], SAMPLE)
    together = engine(model).generate(PROMPTS, SAMPLE)
    narrow = engine(model, max_batch=3).generate(PROMPTS, SAMPLE)
    assert alone[0].token_ids == together[0].token_ids
    assert [c.token_ids for c in together] == [c.token_ids for c in narrow]
    for one, other in zip(together, narrow, strict=True):
        assert torch.allclose(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-5, atol=1e-5)  # fp32, other matmul shapes


def test_equal_prompts_get_different_samples_and_share_the_prefill(model):
    native = engine(model, max_batch=8)
    model.tokens_read = 0
    samples = native.generate([PROMPTS[4]] * 8, replace(SAMPLE, max_new_tokens=1))
    assert model.tokens_read == len(PROMPTS[4])
    assert len({c.token_ids[0] for c in samples}) > 1


def test_seeds_reproduce_and_differ(model):
    first, again, other = (engine(model).generate(PROMPTS, replace(SAMPLE, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert [c.token_ids for c in first] != [c.token_ids for c in other]


def test_the_global_random_state_is_not_touched(model):
    before = torch.random.get_rng_state()
    engine(model).generate(PROMPTS, SAMPLE)
    assert torch.equal(before, torch.random.get_rng_state())


def test_score_is_the_log_softmax_of_the_full_forward(model):
    sequences = [*PROMPTS, [EOT, *b"y" * 300]]
    for options in ({}, {"max_batch": 2}, {"prefill_chunk": 16}):
        for ids, scores in zip(sequences, engine(model, **options).score(sequences), strict=True):
            expected = full_logits(model, ids).double().log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            assert scores.dtype == torch.float32 and scores.shape == (len(ids) - 1,)
            assert torch.allclose(scores.double(), expected, rtol=1e-5, atol=1e-5)  # fp32 logits of size about 10


def test_score_splits_a_large_head_into_parts(model, monkeypatch):
    whole = engine(model).score(PROMPTS)
    monkeypatch.setattr("framework.engines.native.HEAD_ELEMENTS", 3 * model.vocab_size + 1)
    largest = []
    original = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: largest.append(len(hidden)) or original(hidden))
    for one, other in zip(whole, engine(model).score(PROMPTS), strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-6)
    assert max(largest) == 3


def test_logprobs_of_a_completion_are_its_scores(model):
    for prompt, completion in zip(PROMPTS, engine(model).generate(PROMPTS, SAMPLE), strict=True):
        (scores,) = engine(model).score([prompt + completion.token_ids])
        assert torch.allclose(scores[len(prompt) - 1 :], torch.tensor(completion.logprobs), rtol=1e-5, atol=1e-5)


def favour(model: nn.Module, token: int) -> nn.Module:
    """The same model, but `token` always has by far the largest logit."""
    biased = MeanModel()
    biased.load_state_dict(model.state_dict())
    biased.head.bias.data[token] += 100
    return biased.eval()


@pytest.mark.parametrize("stop", ["<|endoftext|>", "<|end|>"])
def test_a_stop_token_ends_a_row_and_is_not_shown(model, stop):
    token = TOKENIZER.special_id(stop)
    native = engine(favour(model, token))
    (completion,) = native.generate([PROMPTS[2]], GREEDY)
    assert (completion.token_ids, completion.text, completion.finish_reason) == ([token], "", "stop")
    assert len(completion.logprobs) == 1
    assert list(native.pieces(PROMPTS[2], GREEDY)) == []


def test_length_ends_a_row(model):
    (completion,) = engine(favour(model, ord("z"))).generate([PROMPTS[2]], GREEDY)
    assert (completion.text, completion.finish_reason, len(completion.logprobs)) == ("z" * 12, "length", 12)


@pytest.mark.parametrize("token", [319, TOKENIZER.special_id("<|user|>")], ids=["padding row of the head", "role mark"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLE], ids=["greedy", "sample"])
def test_ids_without_meaning_are_never_generated(model, token, params):
    assert token not in engine(favour(model, token)).generate([PROMPTS[2]], params)[0].token_ids


def test_rows_that_stop_make_room_for_waiting_prompts(model):
    """Of many prompts only some stop early; all get their own completion, in order, and the batch stays full."""
    biased = favour(model, 0)
    biased.head.bias.data[0] -= 100
    biased.head.bias.data[EOT] += 0.5
    prompts = [[EOT, *f"prompt {n}".encode()] for n in range(30)]
    native = engine(biased, max_batch=4)
    done = list(native.completions(prompts, SAMPLE))
    assert sorted(index for index, _ in done) == list(range(30))
    assert [index for index, _ in done] != list(range(30)), "some row must overtake another for this test to mean anything"
    assert {c.finish_reason for _, c in done} == {"stop", "length"}
    for index, completion in done:
        assert completion.token_ids == uncached(biased, prompts[index], SAMPLE, index, native.stop_ids, native._blocked)


@pytest.mark.parametrize("params", [GREEDY, SAMPLE, replace(SAMPLE, temperature=3.0, max_new_tokens=100)])
def test_stream_joins_to_the_generated_text(model, params):
    native = engine(model)
    pieces = list(native.pieces(PROMPTS[4], params))
    assert "".join(pieces) == native.generate([PROMPTS[4]], params)[0].text
    assert len(pieces) > 1


def test_stream_holds_back_incomplete_characters(model):
    """The model is made to spell "é€😀" byte by byte; no piece may hold half of a character."""
    text = "é€😀"
    spelled = list(text.encode())
    scripted = MeanModel().eval()
    script = iter(spelled)
    scripted.logits = lambda hidden: torch.nn.functional.one_hot(torch.tensor([next(script)]), 320).float() * 50
    assert list(engine(scripted).pieces([EOT], replace(GREEDY, max_new_tokens=len(spelled)))) == list(text)


def test_stream_can_be_left_early_and_leaks_no_mode():
    model = MeanModel().train()
    pieces = engine(model).pieces(PROMPTS[2], SAMPLE)
    next(pieces)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and model.training
    pieces.close()
    assert all(module.training for module in model.modules())


def test_a_model_in_training_can_generate_and_train_on():
    model = MeanModel().train()
    model.mix.eval()
    engine(model).generate(PROMPTS[:2], GREEDY)
    assert model.training and not model.mix.training
    hidden = model(Batch(torch.tensor([PROMPTS[2]]))).hidden
    model.logits(hidden).logsumexp(-1).sum().backward()
    assert model.embed.weight.grad.abs().sum() > 0


def test_rows_that_turn_stale_are_read_again():
    """From 10 tokens on the model works in another regime; decoding must equal the forward that is in that regime from the start."""
    model = MeanModel(switch_at=10).eval()
    native = engine(model, max_batch=4)
    prompts = [[EOT, *b"abcdef"[:length]] for length in (1, 3, 6)] + [[EOT, *b"long from the start"]]
    for index, completion in enumerate(native.generate(prompts, GREEDY)):
        assert completion.token_ids == uncached(model, prompts[index], GREEDY, index, native.stop_ids, native._blocked)


def test_bfloat16_stays_close_to_float32(model):
    exact, rough = (engine(model, dtype=dtype).score(PROMPTS) for dtype in ("float32", "bfloat16"))
    worst = max((a - b).abs().max().item() for a, b in zip(exact[1:], rough[1:], strict=True))
    assert 0 < worst < 0.3  # logits of size about 10, 8 bits of mantissa: 10 * 2^-8 = 0.04, a few of them added


def test_not_finite_logits_are_an_error_with_a_remedy(model):
    broken = favour(model, 5)
    broken.head.bias.data[:] = torch.nan
    with pytest.raises(UserError, match=r"^ckpt: not finite logits after 6 tokens; .*earlier checkpoint"):
        engine(broken).generate([PROMPTS[2]], GREEDY)


def test_a_model_with_a_limit_warns_once(model):
    limited = favour(model, 5)
    limited.max_length = 20
    native = engine(limited)
    with pytest.warns(UserWarning, match="up to 60 tokens, but the model was trained at 20"):
        native.generate([PROMPTS[2]], replace(GREEDY, max_new_tokens=60 - len(PROMPTS[2])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.generate([PROMPTS[2]], replace(GREEDY, max_new_tokens=100))
        limited.window = 8  # a windowed model has no limit
        engine(limited).generate([PROMPTS[2]], replace(GREEDY, max_new_tokens=100))


@pytest.mark.parametrize(
    ("window", "rope_spec", "warns"),
    [
        (16, "some", None),  # no distance is new
        (20, "some", None),  # as long as a training row
        (21, "some", "trained at 20; quality"),  # distance 20 is new
        (None, "some", "trained at 20; quality"),
        (16, None, r"trained at 20, and without positions \(model.position=none\); quality"),
        (None, None, "trained at 20, and without positions"),
        (0, "some", None),
        (0, None, None),  # nothing attends, so that positions do not matter
    ],
)
def test_which_models_warn_beyond_their_training_length(model, window, rope_spec, warns):
    limited = favour(model, 5)
    limited.max_length, limited.window, limited.rope_spec = 20, window, rope_spec
    native = engine(limited)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        native.generate([PROMPTS[2]], replace(GREEDY, max_new_tokens=20 - len(PROMPTS[2])))
        assert not caught  # as long as it was trained
        for length in (21, 22):
            native.generate([PROMPTS[2]], replace(GREEDY, max_new_tokens=length - len(PROMPTS[2])))
    lines = [str(warning.message) for warning in caught]
    assert len(lines) == (warns is not None)
    assert not lines or re.match(f"up to 21 tokens, but the model was {warns}", lines[0])


@pytest.mark.parametrize("variant", ["base", "nope"])
def test_a_real_model_without_positions_warns_and_one_with_a_window_does_not(variant):
    config = compose("train", ["model=samba", "model/size=test", f"model/variant={variant}", "data.seq_len=32"])
    native = engine(build_model(config, TOKENIZER.vocab_size).eval())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        native.generate([PROMPTS[2]], replace(GREEDY, max_new_tokens=33 - len(PROMPTS[2])))
    assert [("without positions" in str(warning.message)) for warning in caught] == ([True] if variant == "nope" else [])


def test_bad_arguments_are_refused(model):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine(model).generate([[EOT], []], GREEDY)
    with pytest.raises(ValueError, match="sequence 0 holds id 320; the model knows 0 to 319"):
        engine(model).score([[EOT, 320]])
    with pytest.raises(UserError, match=r"^engine.max_batch: 0; at least 1"):
        engine(model, max_batch=0)
    with pytest.raises(UserError, match=r"^decode.top_p: 2"):
        engine(model).generate([[EOT]], replace(GREEDY, top_p=2.0))
    assert engine(model).generate([], GREEDY) == [] == engine(model).score([])


def test_yaml_and_constructor_have_the_same_defaults():
    node = yaml.safe_load((CONF / "engine/native.yaml").read_text())
    del node["_target_"]
    parameters = inspect.signature(NativeEngine).parameters
    assert node == {name: p.default for name, p in parameters.items() if p.default is not p.empty}
