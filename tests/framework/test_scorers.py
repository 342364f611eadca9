"""Scorers of decode=best_of_n: scores computed by hand, which calls a judge makes, and what becomes of samples that cannot be judged."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from components.contracts import Completion, Constraint, UserError
from components.decoding.rounds import Query, seed_of
from components.decoding.scorers.base import Scorer
from framework.build import build, compose
from framework.decoding import run_queries, totals
from framework.overrides import group_options
from tests.framework.scripted import Scripted, option, queries, render, setting

SAMPLES = {"12 apples": (-0.1, -0.4), "no idea": (-0.05,), "#### 12": (-1.0, -0.2, -0.3), "so 7": (-2.0, -2.0)}


def said(text, logprobs=(-1.0,), why="stop", reason=None):
    return Completion([1] * len(logprobs), text, list(logprobs), why, reason)


def best_of(scorer, *words, n=4):
    """decode=best_of_n with the scorer of that name, and further words."""
    return build(compose("generate", ["decode=best_of_n", f"decode.n={n}", f"decode/scorer={scorer}", *words]).decode)


def scripted(samples, judge=None):
    """(trace, engine): sample i of the query is samples[i]; `judge` makes a reply of the prompt and the parameters of any other call."""
    by_seed = {seed_of(1, "q0", "sample", i): one for i, one in enumerate(samples)}
    engine = Scripted(lambda prompt, params: by_seed[params.seed] if params.seed in by_seed else judge(prompt, params))

    def run(method, **kwargs):
        (trace,) = run_queries(method, queries("How many?"), engine, render, setting(**kwargs))
        json.dumps(trace.record(), allow_nan=False)
        return trace

    return run, engine


@pytest.mark.parametrize(
    ("scorer", "words", "scores", "chosen"),
    [
        ("likelihood", [], [-0.5, -0.05, -1.5, -4.0], 1),
        ("mean_likelihood", [], [-0.25, -0.05, -0.5, -2.0], 1),
        ("rule", [], [1 + math.exp(-0.25), math.exp(-0.05), 1 + math.exp(-0.5), 1 + math.exp(-2)], 0),
        ("rule", ["decode.scorer.read.mark='#### '"], [math.exp(-0.25), math.exp(-0.05), 1 + math.exp(-0.5), math.exp(-2)], 2),
    ],
)
def test_scores_by_hand(scorer, words, scores, chosen):
    """Log-probabilities of the samples are -0.1-0.4, -0.05, -1-0.2-0.3 and -2-2; `no idea` alone has no number, one has the mark."""
    run, engine = scripted([said(text, logprobs) for text, logprobs in SAMPLES.items()])
    trace = run(best_of(scorer, *words))
    assert trace.answer.notes["scores"] == pytest.approx(scores) and trace.answer.chosen == chosen
    assert trace.answer.completion.text == list(SAMPLES)[chosen]
    assert trace.usage()["calls"] == 4 and len(engine.rounds) == 1 and trace.answer.notes["unscored"] == 0


def test_the_sum_favours_short_samples_and_the_mean_does_not():
    run, _ = scripted([said("long", (-0.3,) * 10), said("short", (-1.0,))])
    assert run(best_of("likelihood", n=2)).answer.chosen == 1 and run(best_of("mean_likelihood", n=2)).answer.chosen == 0
    assert option("best_of_n").scorer.of is best_of("mean_likelihood").scorer.of  # what no word chooses


def test_a_rule_does_without_log_probabilities_and_a_likelihood_does_not():
    """Of equals the first counts."""
    run, _ = scripted([said("none", ()), said("5", ()), said("6", ())])
    trace = run(best_of("rule", n=3))
    assert trace.answer.notes["scores"] == [0, 1, 1] and trace.answer.chosen == 1
    with pytest.raises(UserError, match=r"this engine gives none; take decode/scorer=rule"):
        run(best_of("likelihood", n=3))


def test_a_judge_is_shown_each_sample_alone_and_held_to_its_reply():
    """Three samples; log P(Yes) is -3, -0.5 and -2. One more call each, in a second round, greedy, and only `Yes` may be said."""
    samples, sure = ["it is 1", "it is 2", "it is 3"], {"it is 1": -3.0, "it is 2": -0.5, "it is 3": -2.0}

    def judge(prompt, params):
        (shown,) = [text for text in samples if text in prompt]
        return said("Yes", (sure[shown] - 0.25, 0.25))

    run, engine = scripted([said(text) for text in samples], judge)
    trace = run(best_of("judge", n=3))
    assert trace.answer.notes["scores"] == [-3.0, -0.5, -2.0] and trace.answer.completion.text == "it is 2"
    first, second = engine.rounds
    assert (len(first), len(second)) == (3, 3) and [call.ask.role for call in trace.calls[3:]] == ["judge"] * 3
    assert all((one.temperature, one.constraint) == (0.0, Constraint(choice=("Yes",))) for _, one in second)
    assert all(prompt.startswith("How many?\n") and "Is this attempt right?" in prompt for prompt, _ in second)
    assert trace.usage()["calls"] == 6 and trace.usage()["rounds"] == 2
    # reply: another word, in another template
    words = ["decode.scorer.reply=' sure'", "decode/template@decode.scorer.template=feedback"]
    method = best_of("judge", *words, n=2).scorer
    asks = next(method.judge(Query("q0", "How many?"), [said("1"), said("2")], setting()))
    assert all(one.params.constraint.choice == (" sure",) and "could be better" in one.said for one in asks)


def test_scores_of_a_real_model_are_what_its_engine_scores():
    """The judge's score is log P(reply and stop | prompt) and the likelihood that of the sample, each read off `Engine.score` anew."""
    import torch

    from components.data.tokenizers import bytes_tokenizer
    from framework.build import build_model
    from framework.decoding import setting_of, traced
    from framework.engines.native import NativeEngine

    torch.manual_seed(0)
    tokenizer = bytes_tokenizer()
    model = build_model(compose("train", ["model=phi4mini", "model/size=test", "data.seq_len=64"]), tokenizer.vocab_size).eval()
    engine = NativeEngine(model, tokenizer)

    def rendered(text):
        return [tokenizer.eot_id, *tokenizer.encode(text)]

    for scorer in ("judge", "likelihood"):
        method = best_of(scorer, n=3)
        params = replace(method.params(6, 1), seed=1)
        own = setting_of(engine, tokenizer, rendered, params)
        ((_, answer),) = traced(method, ["How many?"], engine, rendered, own, model.forward_flops)
        expected = []
        for i, one in enumerate(answer.candidates):
            said = one.token_ids
            if scorer == "judge":
                said = [*tokenizer.encode("Yes"), tokenizer.eot_id]
                prompt = rendered(answer.trace["calls"][3 + i]["said"])
                assert answer.trace["calls"][3 + i]["text"] == "Yes" and one.text in answer.trace["calls"][3 + i]["said"]
            else:
                prompt = rendered("How many?")
            expected.append(float(engine.score([[*prompt, *said]])[0][-len(said) :].sum()))
        assert answer.trace["notes"]["scores"] == pytest.approx(expected, abs=1e-4) and len(set(expected)) == 3
        assert answer.trace["chosen"] == max(range(3), key=expected.__getitem__)
        assert answer.trace["usage"]["calls"] == (6 if scorer == "judge" else 3)


def test_a_sample_that_cannot_be_judged_is_no_answer():
    """A call that fails, or a server that does not say what it is told, leaves a sample without a score; with none it is an error."""
    replies = {"sample a": said("", (), "error", "no"), "sample b": said("No", (-0.1,)), "sample c": said("Yes", (-9.0,))}
    run, _ = scripted([said(text) for text in replies], lambda prompt, _: next(own for text, own in replies.items() if text in prompt))
    trace = run(best_of("judge", n=3))
    assert trace.answer.notes["scores"] == [None, None, -9.0] and trace.answer.chosen == 2
    assert totals([trace.record()])["decode/unscored"] == 2
    for reply, why in ((said("", (), "error", "http_400"), "http_400"), (said("No", (-0.1,)), "the judge said 'No', not 'Yes'")):
        run, _ = scripted([said("a"), said("b")], lambda *_, reply=reply: reply)
        trace = run(best_of("judge", n=2))
        assert trace.record()["error"] == f"no sample could be scored: {why}" and trace.answer.chosen is None
    run, _ = scripted([said("", (), "error", "gone"), said("b", (-5.0,))], None)
    trace = run(best_of("likelihood", n=2))
    assert trace.answer.notes["scores"] == [None, -5.0] and trace.answer.chosen == 1
    run, _ = scripted([said("", (), "error", "gone")], None)
    assert run(best_of("likelihood", n=1)).record()["error"] == "no sample could be scored: gone"


def test_a_judge_without_room():
    """The prompt, and `Yes` in bytes with a stop token, must fit; samples lose their front before that."""
    run, engine = scripted([said("x" * 40 + "END"), said("END")], lambda *_: said("Yes", (-1.0,)))
    method = best_of("judge", n=2)
    run(method)
    longest = max(len(prompt) for prompt, _ in engine.rounds[1])
    trace = run(method, limit=longest + 4 - 10)
    assert trace.answer.notes["dropped_tokens"] == [[10], [0]] and all("END\n" in prompt for prompt, _ in engine.rounds[3])
    assert run(method, limit=100).record()["error"] == "no room for the candidates in the context"


def test_a_scorer_of_ones_own():
    class Longest(Scorer):
        def scores(self, query, candidates):
            assert query.text == "How many?"
            return [math.nan if one.text == "not a number" else len(one.text) for one in candidates]

    method = best_of("rule", n=3)
    method.scorer = Longest()
    run, _ = scripted([said("not a number"), said("bb"), said("c")])
    trace = run(method)
    assert trace.answer.completion.text == "bb" and trace.answer.notes["scores"] == [None, 2, 1]
    method.n = 2
    method.scorer.scores = lambda query, candidates: [1.0]
    with pytest.raises(UserError, match=r"decode\.scorer: 1 scores for 2 answers"):
        run(method)


def test_what_is_wrong_is_said():
    assert set(group_options("decode/scorer")) == {"judge", "likelihood", "mean_likelihood", "rule"}
    for scorer, words, message in (
        ("likelihood", ["decode.scorer.per=tokn"], "did you mean 'token'"),
        ("judge", ["decode.scorer.reply=''"], "decode.scorer.reply: ''"),
        ("rule", ["decode.scorer.read.mark=''"], "decode.read.mark: ''"),
    ):
        with pytest.raises(UserError) as caught:
            best_of(scorer, *words)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="'rul' is not an option; one of judge, likelihood"):
        compose("generate", ["decode=best_of_n", "decode/scorer=rul"])
    node = OmegaConf.to_container(compose("generate", ["decode=best_of_n"]).decode, resolve=True)
    assert node["scorer"]["per"] == "token"
