"""The search of factors as a task: its file loads, its scores are those of a direct evaluation, and it goes on where it stopped."""

from __future__ import annotations

import functools
import itertools
import json
import math
import shlex
import signal

import pytest
import torch
from omegaconf import OmegaConf
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import framework.train as training
from components.blocks import inverse_frequencies
from components.contracts import UserError
from components.search.needle import Needle, needle_perplexity, needles, token_perplexity
from framework.build import build, build_data, compose, load_run
from framework.logging import read_rows
from framework.parts import build_parts
from framework.procedure import check_procedure, text_ids
from framework.rope_options import rope_spec, rope_words
from framework.runs import read_state
from framework.runtime import Interrupted
from framework.search_report import SearchProgress
from tests.framework.training import config as training_config
from tests.framework.training import train

L0, LENGTH, SCALE = 32, 384, 12.0
MODEL = ["model=phi4mini", "trainer.precision=32-true"]
SMALL = [
    "task=rope_search", f"task.target_len={LENGTH}", "task.documents=3", "task.validation_documents=2", "task.population=4",
    "task.iterations=2", "task.parents=3", "task.mutations=2", "task.crossovers=2", "task.seeds=[yarn]",
]  # fmt: skip
TOTAL = 4 + 2 * 4


@pytest.fixture(scope="module", autouse=True)
def one_commit():
    """Files are compared to the byte, whatever is committed while the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("framework.search_report.runtime.git_state", lambda: {"sha": "0" * 40, "dirty": False})
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of two steps of training at 32 tokens a row."""
    folder = tmp_path_factory.mktemp("base")
    train(training_config(folder, *MODEL, "trainer.max_steps=2"), folder / "run")
    return folder


def config(base, *words):
    return training_config(base, *MODEL, f"ckpt={base / 'run'}", *SMALL, *words)


@pytest.fixture(scope="module")
def done(base, tmp_path_factory):
    """A finished search: (folder, metrics, what it said)."""
    run, said = tmp_path_factory.mktemp("done") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("framework.procedure.say", said.append)
        metrics = train(config(base, "seed=3"), run)
    return run, metrics, said


@pytest.fixture(scope="module")
def parts(base, tmp_path_factory):
    """What a search starts from."""
    return build_parts(config(base), tmp_path_factory.mktemp("parts"), resuming=False)


def result(run):
    return json.loads((run / "factors.json").read_text())


def logged(run, name="rope_search.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()][1:]


@functools.cache
def documents(base, seed=3):
    """Those of the search, made anew: three to score on, then two held out."""
    data = build_data(config(base))
    data.prepare(base / "cache")
    text = text_ids(data, 5 * LENGTH, seed, "task.documents").tolist()
    made = needles(text, data.tokenizer, LENGTH, 5, [0.0], seed)
    return made[:3], made[3:]


def score(base, node, some):
    """Perplexity of needles by the trained weights under an option of the group `rope`, through the only loader of runs."""
    return needle_perplexity(some)(load_run(base / "run", {"rope": OmegaConf.create(node)}).model)


@functools.cache
def rope_node(*words):
    return OmegaConf.to_container(compose("train", ["model=phi4mini", *words]).rope)


def deployed(run):
    return rope_node("rope=longrope2", f"rope.factor={SCALE}", f"rope.factors={run / 'factors.json'}")


def test_the_file_is_an_option_and_its_score_is_the_one_that_was_logged(base, done):
    run, metrics, _ = done
    found, (scoring, held_out) = result(run), documents(base)
    assert score(base, deployed(run), scoring) == metrics["search/best"] == found["search"]["score"]
    assert score(base, deployed(run), held_out) == metrics["search/heldout"] == found["search"]["heldout"]
    best = min(logged(run), key=lambda line: line["score"])
    assert (best["score"], best["r"], best["factors"]) == (
        metrics["search/best"], metrics["search/r"], found["rope_parameters"]["long_factor"],
    )  # fmt: skip
    assert metrics["search/best"] != score(base, rope_node("rope=none"), scoring)


def test_transformers_loads_the_file(done):
    block = result(done[0])["rope_parameters"]
    node, numbers = {"rope": "longrope2", "factors": str(done[0] / "factors.json")}, {"rotary_dim": 12, "base": 1e4, "original_len": L0}
    spec = rope_spec("task.deploy", node, numbers, factor=SCALE)
    whole = PretrainedConfig(head_dim=16, hidden_size=48, num_attention_heads=4, max_position_embeddings=LENGTH, rope_parameters=block)
    for length, ours in zip((L0, LENGTH), inverse_frequencies(spec), strict=True):
        theirs, attention = ROPE_INIT_FUNCTIONS[block["rope_type"]](whole, "cpu", seq_len=length)
        torch.testing.assert_close(theirs.double(), ours, rtol=2e-6, atol=0)
        assert attention == spec.attention_factor == pytest.approx(math.sqrt(1 + math.log(SCALE) / math.log(L0)), rel=1e-12)


def test_the_other_rules_are_scored_as_they_are_and_with_the_same_attention_factor(base, done):
    metrics, (scoring, held_out) = done[1], documents(base)
    attention = result(done[0])["rope_parameters"]["attention_factor"]
    rules = {
        "none": ["rope=none"], "linear": ["rope=linear"], "ntk": ["rope=ntk"], "ntk_critical": ["rope=ntk", "rope.variant=critical"],
        "yarn": ["rope=yarn"],
    }  # fmt: skip
    for name, words in rules.items():
        node = rope_node(*words, *([] if name == "none" else [f"rope.factor={SCALE}"]))
        assert metrics[f"search/score@{name}"] == score(base, node, scoring)
        assert metrics[f"search/heldout@{name}"] == score(base, node, held_out)
    yarn = score(base, rope_node("rope=yarn", f"rope.factor={SCALE}", f"rope.attention_factor={attention}"), scoring)
    assert metrics["search/score_same_attention@yarn"] == yarn != metrics["search/score@yarn"]
    assert {line["key"] for line in logged(done[0], "rope_compare.jsonl")} == {
        key.removeprefix("search/") for key in metrics if "@" in key or key == "search/heldout"
    }


def test_the_table_of_every_rule_is_an_option_that_scores_as_the_rule(base, done):
    """Also of the plain one, whose own factor is 1."""
    run, metrics, _ = done
    assert {file.stem for file in (run / "tables").iterdir()} == {"found", "none", "linear", "ntk", "ntk_critical", "yarn"}
    attention = result(run)["rope_parameters"]["attention_factor"]
    for name, word, key in (
        ("found", "null", "search/best"), ("none", "null", "search/score@none"), ("yarn", "null", "search/score@yarn"),
        ("ntk", attention, "search/score_same_attention@ntk"),
    ):  # fmt: skip
        words = [f"rope.factors={run / 'tables' / name}.json", f"rope.attention_factor.value={word}", f"rope.factor={SCALE}"]
        assert score(base, rope_node("rope=longrope", *words), documents(base)[0]) == metrics[key], name


def test_questions_of_the_data_come_before_needles(base, tmp_path):
    """Those of data=synthetic: the model is asked what it was trained on."""
    synthetic = [
        "data=synthetic", "data.kind=pairs", "data.length=127", "data.train_documents=20", "data.val_documents=4", "task.rows=3",
        "task.population=3", "task.iterations=0", "task.seeds=[]", "task.compare={ntk: {rope: ntk}}", f"task.target_len={LENGTH}",
        "data.seq_len=128", "data.batch_size=4", "data.tokenizer.kind=bytes", "data.tokenizer.vocab_size=300", "model/size=test",
        "model.max_length=32", f"ckpt={base / 'run'}", "logger=none", f"paths.cache_dir={tmp_path / 'cache'}", "seed=5",
    ]  # fmt: skip
    composed = compose("train", [*MODEL, "task=rope_search", "task.documents=3", "task.validation_documents=2", *synthetic])
    metrics = train(composed, tmp_path / "run")
    data = build_data(composed)
    data.prepare(tmp_path / "cache")
    asked = data.questions(LENGTH, 5, 5)
    assert all(len(ids) == LENGTH and answer == 1 for ids, answer in asked)
    scoring, held_out = ([Needle(tuple(ids), answer, None) for ids, answer in some] for some in (asked[:3], asked[3:]))
    node = rope_node("rope=ntk", f"rope.factor={SCALE}")
    assert metrics["search/score@ntk"] == pytest.approx(score(base, node, scoring), rel=1e-6)  # one row at a time, and three
    assert metrics["search/heldout@ntk"] == pytest.approx(score(base, node, held_out), rel=1e-6)


def test_its_run_reads_like_any_other(done):
    run, metrics, said = done
    lines, rows = logged(run), read_rows(run)
    assert [line["id"] for line in lines] == list(range(TOTAL)) and lines[0]["op"] == "seed"
    assert [row["step"] for row in rows] == [4, 8, 12] == [row["tokens"] / (3 * LENGTH) for row in rows]
    assert [row["search/generation"] for row in rows] == [0, 1, 2] and rows[-1]["search/best"] == metrics["search/best"]
    assert json.loads((run / "metrics.json").read_text()) == metrics and metrics["search/evaluations"] == TOTAL
    assert metrics["search/seconds"] == pytest.approx(sum(line["seconds"] for line in lines)) and metrics["search/failed"] == 0
    assert read_state(run)["status"] == "done" and metrics["search/critical_index"] == 2
    assert all((run / name).stat().st_size > 10_000 for name in ("factors.png", "search.png"))
    assert sum(line.startswith("generation") for line in said) == 3
    assert sum(line.startswith("warning: the best score is no better than guessing the number, 7.4") for line in said) == 1
    about = result(run)["search"]
    assert about["attention"]["short"] == 1 and about["provenance"]["objective"] == "needle_ppl" and about["task"]["seed"] == 3


def test_the_last_lines_are_commands_that_are_accepted(done):
    """Both name the file; the longer rows of further training are of two kinds."""
    commands = [shlex.split(line.partition("python ")[2].partition("   (")[0]) for line in done[2][-2:]]
    for (script, *words), name in zip(commands, ("train", "generate"), strict=True):
        assert script == f"{name}.py"
        rope = compose(name, words).rope
        assert rope.factors == str(done[0] / "factors.json") and rope.factor == SCALE and rope._target_.endswith("LongRope2")
    assert compose("train", commands[0][1:]).data.window_mix == {"short_len": L0, "long_share": 0.5}
    node = {"rope": "longrope2", "attention_factor": {"policy": "both", "value": None}}
    assert rope_words(node, factor=2.0) == ["rope=longrope2", "'rope.attention_factor={policy: both, value: null}'", "rope.factor=2.0"]


def stop_after(count, monkeypatch):
    """A signal comes during that evaluation."""
    heard = SearchProgress.on_evaluation

    def on_evaluation(self, state):
        if state["evaluations"] == count:
            signal.raise_signal(signal.SIGTERM)
        heard(self, state)

    monkeypatch.setattr(SearchProgress, "on_evaluation", on_evaluation)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_a_stopped_search_goes_on_to_the_same_file(base, done, tmp_path, monkeypatch, count):
    """Within the first generation, and at the end of the second: each row of metrics is there once, and no evaluation twice."""
    with monkeypatch.context() as patch:
        stop_after(count, patch)
        with pytest.raises(Interrupted, match=r"stopped; go on with: python train\.py resume="):
            train(config(base, "seed=3"), tmp_path / "run")
    before = (tmp_path / "run/rope_search.jsonl").read_bytes()
    assert read_state(tmp_path / "run")["status"] == "interrupted" and len(logged(tmp_path / "run")) == count
    said = []
    monkeypatch.setattr("framework.procedure.say", said.append)
    metrics = train(config(base, "seed=3"), tmp_path / "run", resuming=True)
    assert f"going on: {count} evaluations are in {tmp_path / 'run/rope_search.jsonl'}" in said
    assert sum(line.startswith("generation") for line in said) == 3 - count // 8
    assert (tmp_path / "run/rope_search.jsonl").read_bytes().startswith(before)
    assert (tmp_path / "run/factors.json").read_bytes() == (done[0] / "factors.json").read_bytes()
    keys = ("step", "tokens", "search/generation", "search/best", "search/median", "search/r")
    first, second = ([{key: row[key] for key in keys} for row in read_rows(run)] for run in (done[0], tmp_path / "run"))
    assert first == second
    timeless = {key for key in metrics if "seconds" not in key and not key.startswith("perf/")}
    assert {key: metrics[key] for key in timeless} == {key: done[1][key] for key in timeless}


def test_what_a_resumed_search_must_find_unchanged(base, done):
    before = (done[0] / "rope_search.jsonl").read_bytes()
    for words, message in (
        (["task.population=5"], r"task\.population: 5, but .*rope_search\.jsonl was begun with 4; set it back"),
        (["task.documents=2"], r"provenance\.documents: .* was begun with"),
        (["task.target_len=320"], r"space\.factor: 10\.0, but .* was begun with 12\.0"),
    ):
        with pytest.raises(UserError, match=message):
            train(config(base, "seed=3", *words), done[0], resuming=True)
    assert (done[0] / "rope_search.jsonl").read_bytes() == before


def test_other_ways_to_search(base, tmp_path):
    """Every token counts; the attention factor that is to be deployed is the one that is searched with; rules are left out and added."""
    words = [
        "seed=3", "task.objective=token_ppl", "task.validation_documents=0", "task.r_moves=0.5", "task.rows=2", "task.budget=6",
        "task.deploy.attention_factor={policy: both, value: 1.5}", "task.seeds=[]", "task.compare.yarn=null", "task.compare.none=null",
        "task.compare.linear=null", "+task.compare.dynamic={rope: dynamic}",
    ]  # fmt: skip
    metrics = train(config(base, *words), tmp_path / "run")
    found, attention = result(tmp_path / "run"), {"policy": "both", "value": 1.5}
    assert found["rope_parameters"]["attention_factor"] == 1.5 and found["search"]["attention"] == {"short": 1.5, "long": 1.5}
    assert metrics["search/evaluations"] == 6 and "search/heldout" not in metrics and found["search"]["heldout"] is None
    assert {key for key in metrics if "score@" in key} == {f"search/score@{name}" for name in ("ntk", "ntk_critical", "dynamic")}
    node = {**deployed(tmp_path / "run"), "attention_factor": attention}
    model = load_run(base / "run", {"rope": OmegaConf.create(node)}).model
    assert token_perplexity(documents(base)[0], rows=2)(model) == metrics["search/best"]


def disturbed(monkeypatch, disturb):
    """Call `disturb(model)` when the parts are built."""
    build_parts = training.build_parts

    def disturbed_parts(*args):
        parts = build_parts(*args)
        disturb(parts.model)
        return parts

    monkeypatch.setattr(training, "build_parts", disturbed_parts)


def test_a_candidate_without_memory_is_the_worst_and_the_search_goes_on(base, done, tmp_path, monkeypatch):
    models, calls, held_out = [], itertools.count(), [torch.tensor([documents(base)[1][0].ids[:-1]])]

    def no_memory(module, inputs):
        first_held_out = held_out and torch.equal(inputs[0].input_ids, held_out[0])
        if first_held_out:
            held_out.clear()
        if next(calls) in (3, 4, 7) or first_held_out:  # first documents of the second and third candidate, third of the fourth
            raise torch.OutOfMemoryError("CUDA out of memory")

    disturbed(monkeypatch, lambda model: (models.append(model), model.register_forward_pre_hook(no_memory)))
    metrics = train(config(base, "seed=3"), tmp_path / "run")
    failed = [line for line in logged(tmp_path / "run") if line["score"] is None]
    assert metrics["search/failed"] == len(failed) == 3 and {line["reason"] for line in failed} == {"OutOfMemoryError: CUDA out of memory"}
    assert metrics["search/heldout"] == math.inf and result(tmp_path / "run")["search"]["heldout"] is None
    assert math.isfinite(metrics["search/best"]) and math.isfinite(metrics["search/heldout@yarn"]) and models[0].rope_spec.plain


def test_weights_that_score_nothing(base, tmp_path, monkeypatch):
    def poison(model):
        model.norm.weight.data.fill_(math.nan)

    disturbed(monkeypatch, poison)
    with pytest.raises(UserError, match=r"none of 4 candidates has a finite score \(the score is nan\)"):
        train(config(base), tmp_path / "run")
    assert read_state(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "needle_pll"}, r"task\.objective: 'needle_pll' is not one of needle_ppl, token_ppl; did you mean 'needle_ppl'\?"),
        ({"population": 0}, r"task\.population: 0; allowed is a whole number >= 1"),
        ({"documents": 0}, r"task\.documents: 0; at least 1"),
        ({"validation_documents": -1}, r"task\.validation_documents: -1; at least 0"),
        ({"rows": 0}, r"task\.rows: 0; at least 1"),
        ({"depths": [0.0, 2.0]}, r"task\.depths: \[0\.0, 2\.0\]; allowed are numbers from 0"),
        ({"seeds": ["yarm"]}, r"task\.seeds: 'yarm' is not in task\.compare: none, .*, yarn; did you mean 'yarn'\?"),
        ({"compare": {"found": {"rope": "ntk"}}}, r"task\.compare: 'found' is the name of what the search finds"),
        ({"mutation_probability": 0.0}, r"task\.mutation_probability: 0\.0; allowed is 0 < p <= 1"),
    ],
)
def test_values_that_no_model_makes_right(change, message):
    node = OmegaConf.to_container(compose("train", ["task=rope_search", "task.target_len=384"]).task)
    with pytest.raises(UserError, match=f"^{message}"):
        build({**node, **change})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.population=2"], r"task\.population: 2; at least 3 is allowed here, one candidate for each r from 1 to 2 and each of task"),
        (["task.low=3.0"], r"task\.low: 3\.0, task\.high: 2\.0; allowed is 1/factor <= low < high"),
        (["task.target_len=32"], r"task\.target_len: 32; allowed is more than the model was trained at, model\.max_length=32"),
        (["task.target_len=100"], r"task\.length: 100; a needle, its question and its answer alone take \d+ tokens"),
        (["task.length=33"], r"task\.length: 33; allowed is 34 to task\.target_len=384"),
        (["task.length=385"], r"task\.length: 385; allowed is 34 to task\.target_len=384"),
        (["task.documents=90"], r"task\.documents: the data has [\d,]+ tokens and 35,328 are needed; lower it, or give more text"),
        (["task.deploy.rope=yarn"], r"task\.deploy\.rope: 'yarn' is not one of longrope, longrope2"),
        (["task.deploy.attention_factor.policy=lomg"], r"task\.deploy\.attention_factor: .*allowed are"),
        (["task.compare.yarn.rope=yran"], r"task\.compare\.yarn\.rope: 'yran' is not one of .*; did you mean 'yarn'\?"),
        (["+task.compare.yarn.beta=2"], r"task\.compare\.yarn\.beta: unknown key of YaRN"),
        (["+task.compare.yarn.beta_slow=9"], r"task\.compare\.yarn\.beta_slow: 9\.0; allowed is below model\.max_length / 2pi"),
        (["ckpt=null"], r"ckpt: null; random weights read nothing"),
        (["stop.train_loss_below=0.5"], r"stop\.train_loss_below: 0\.5; this task trains and evaluates nothing"),
        (["trainer.devices=2"], r"trainer\.devices: 2; this task runs in one process"),
    ],
)
def test_mistakes_are_one_line(base, parts, words, message):
    with pytest.raises(UserError, match=f"^{message}") as error:
        check_procedure(config(base, *words), parts)
    assert len(str(error.value).splitlines()) == 1


def test_a_mistake_leaves_no_run(base, tmp_path):
    for words, message in (
        (["rope=linear"], "rope: 'linear' is what a search would replace; add rope=none"),
        (["ckpt=null"], "ckpt: null"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            train(config(base, *words), tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.position=none"], r"model\.position: 'none'; a search needs a model with rotary positions"),
        (["model.window=16"], r"model\.window: 16; a token sees no farther back .* rows of model\.max_length=32 had all such distances"),
        (["model.window=300"], r"task\.target_len: 384; model\.window=300 is the longest distance; at most that is allowed"),
        (["model=samba", "model/variant=mamba_only"], r"model\.layer_pattern: no layer of this model attends"),
    ],
)
def test_models_in_which_factors_would_change_nothing(base, tmp_path, words, message):
    train(training_config(base, *MODEL, *words, "trainer.max_steps=1"), tmp_path / "model")
    with pytest.raises(UserError, match=f"^{message}"):
        train(config(base, *words, f"ckpt={tmp_path / 'model'}"), tmp_path / "run")


def test_the_optimised_metric_follows_the_task_and_the_target_must_be_said(base):
    assert config(base).optimized_metric == "search/best"
    with pytest.raises(UserError, match=r"task\.target_len: no value given; write task\.target_len=VALUE"):
        compose("train", ["task=rope_search"])
