"""A task that is run instead of trained: its run reads like any other; what it says of the cost of decoding is true."""

from __future__ import annotations

import copy
import itertools
import json
import re
import signal

import pytest
import torch
from omegaconf import OmegaConf

from components.contracts import Batch, UserError
from framework import procedure
from framework.build import build_data, compose
from framework.logging import RunLogger, read_rows
from framework.preflight import preflight
from framework.procedure import ASKS, Procedure, is_procedure, refuse_unheard, text_ids
from framework.runs import read_state
from framework.runtime import Interrupted
from framework.tasks import decode_cost
from framework.tasks.decode_cost import DecodeCost
from tests.framework.training import config as training_config
from tests.framework.training import train

SMALL = ["task=decode_cost", "task.positions=[40,8,150]", "task.tokens=2", "task.repeats=2", "task.prefill_chunk=32"]
FULL = "model.layer_pattern=[full_attention]"


def config(folder, *overrides):
    return training_config(folder, *SMALL, "trainer.precision=32-true", *overrides)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of the hybrid: (folder, metrics, its model, what the model was fed, {position: tokens before and after each turn})."""
    folder = tmp_path_factory.mktemp("decode_cost")
    fed, turns, models = [], {}, []
    batch, decode = decode_cost.Batch, DecodeCost._decode

    def spy(self, context, place):
        models.append(context.model)
        position = (8, 40, 150)[(len(models) - 1) % 3]  # they take turns in this order
        told = turns.setdefault(position, [int(place.token)])
        decode(self, context, place)
        told.append(int(place.token))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_cost, "Batch", lambda ids: fed.append(ids.clone()) or batch(ids))
        patch.setattr(DecodeCost, "_decode", spy)
        metrics = train(config(folder, "seed=3"), folder / "run")
    return folder, metrics, models[0], fed, turns


@pytest.fixture(scope="module")
def text(done):
    """The tokens that the finished run read."""
    data = build_data(config(done[0]))
    data.prepare(done[0] / "cache")
    return data, text_ids(data, 151, 3, "task.positions")


def test_state_and_slowdown_by_position(done, tmp_path):
    """A hybrid's state keeps its size; keys and values of full attention are counted to the byte."""
    hybrid, full = done[1], train(config(tmp_path, FULL), tmp_path / "full")
    sizes = [hybrid[f"decode/state_bytes@{position}"] for position in (8, 40, 150)]
    assert len(set(sizes)) == 1 and hybrid["decode/state_growth_bytes"] == 0
    # 2 layers of keys and values of 2 heads of 16 fp32 numbers; the cache has room for as many tokens as it may ever hold, here 158
    assert full["decode/state_bytes@150"] == 158 * 2 * 2 * 2 * 16 * 4
    for metrics in (hybrid, full):
        assert metrics["decode/slowdown"] == metrics["decode/slowdown@150"] > 0
        assert metrics["decode/slowdown@150"] == pytest.approx(metrics["decode/ms_per_token@150"] / metrics["decode/ms_per_token@8"])
        assert metrics["decode/slowdown@8"] == 1
        assert 0 < metrics["prefill/seconds@8"] < metrics["prefill/seconds@40"] < metrics["prefill/seconds@150"] < metrics["seconds"]


def test_its_run_reads_like_any_other(done):
    run, metrics = done[0] / "run", done[1]
    assert json.loads((run / "metrics.json").read_text()) == metrics
    assert {"seed", "seconds", "params/total", "perf/peak_memory_bytes"} < set(metrics) and metrics["seed"] == 3
    state = read_state(run)
    assert state["status"] == "done" and state["seed"] == 3 and {"versions", "git", "created", "data"} < set(state)
    rows = read_rows(run)
    assert [row["tokens"] for row in rows] == [8, 40, 150]
    assert [row["decode/ms_per_token"] for row in rows] == [metrics[f"decode/ms_per_token@{position}"] for position in (8, 40, 150)]
    assert (run / "config.yaml").is_file() and (run / "tokenizer").is_dir()


def test_what_is_read_is_the_text_in_chunks(done, text):
    """The held-out text, then the training text, whole, in chunks that end at each position."""
    data, wanted = text
    chunks = done[3][4:]  # after two chunks and two steps of warming up
    assert [ids.shape[1] for ids in chunks[:8]] == [8, 32, 32, 32, 32, 14, 1, 1]
    assert torch.equal(torch.cat(chunks[:6], dim=1)[0], wanted[:150])
    assert data.tokenizer.decode(wanted.tolist()).startswith("5000 times 5000 is 25000000. 5001 times")


def test_the_timed_steps_are_those_of_the_model(done, text):
    """Greedy tokens of each place against forwards over the text and what was said, over both turns."""
    model, turns = done[2], done[4]
    assert list(turns) == [8, 40, 150]
    for position, seen in turns.items():
        ids = text[1][: position + 1].tolist()
        for _ in range(2 * (2 + decode_cost.WARM_UP)):
            with torch.no_grad():
                ids.append(int(model.logits(model(Batch(torch.tensor([ids]))).hidden[0, -1]).argmax()))
        assert seen == [ids[position], ids[position + 4], ids[position + 8]]


def test_the_optimised_metric_follows_the_task(tmp_path):
    assert config(tmp_path).optimized_metric == "decode/slowdown"
    assert config(tmp_path, "optimized_metric=seconds").optimized_metric == "seconds"
    assert compose("train", []).optimized_metric == "val/loss"


def test_text_goes_on_in_the_training_text_and_ends(text):
    data = text[0]
    held_out = sum(int((batch.labels >= 0).sum()) for batch in data.val_batches())
    epoch = data.train_stream(1)
    training = sum(int((batch.labels >= 0).sum()) for batch in itertools.islice(epoch, len(epoch)))
    assert 250 < held_out < 400
    assert len(text_ids(data, held_out + 100, 1, "task.positions")) == held_out + 100
    with pytest.raises(UserError, match=rf"task.positions: the data has {held_out + training:,} tokens and 1,000,000 are needed"):
        text_ids(data, 1_000_000, 1, "task.positions")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.positions=[8]"], "task.positions: .8.; at least two different"),
        (["task.positions=[0,8]"], "task.positions: 0; at least 1"),
        (["task.tokens=0"], "task.tokens: 0; at least 1"),
        (["trainer.devices=2"], "trainer.devices: 2; this task runs in one process"),
        (["stop.train_loss_below=0.5"], "stop.train_loss_below: 0.5; this task trains and evaluates nothing, .*; leave it null"),
        (["data.eval_lengths=[16,64]"], "data.eval_lengths: .16, 64.; this task trains and evaluates nothing, .*; leave it ..$"),
        (["task.positions=[8,90000]"], "task.positions: the data has .* tokens and 90,001 are needed"),
    ],
)
def test_mistakes(tmp_path, words, message):
    with pytest.raises(UserError, match=f"^{message}"):
        train(config(tmp_path, *words), tmp_path / "run")


def test_what_a_run_without_training_cannot_honour_is_refused():
    """Every key of the list exists, is off in a default run, and is refused when it asks for something."""
    default = compose("train", ["task=decode_cost", "logger=none", "paths.output_dir=x"])
    refuse_unheard(default)
    for key, value, off in (
        ("stop.train_loss_below", 0.0, "null"), ("data.eval_lengths", [16], "[]"), ("ema.enabled", True, "false"),
        ("compile.enabled", True, "false"),
    ):  # fmt: skip
        assert ASKS[key] == off
        config = copy.deepcopy(default)
        OmegaConf.update(config, key, value)
        with pytest.raises(UserError, match=f"^{key}: .*; leave it {re.escape(off)}$"):
            refuse_unheard(config)
    assert len(ASKS) == 4


def test_a_signal_stops_it_and_a_failure_is_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr(DecodeCost, "_warm_up", lambda self, context, ids: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"start it again with: python train\.py resume="):
        train(config(tmp_path), tmp_path / "run")
    assert read_state(tmp_path / "run")["status"] == "interrupted" and signal.getsignal(signal.SIGTERM) is before

    def broken(self, context, ids):
        raise RuntimeError("no")

    monkeypatch.setattr(DecodeCost, "_warm_up", broken)
    with pytest.raises(RuntimeError):
        train(config(tmp_path), tmp_path / "other")
    assert read_state(tmp_path / "other")["status"] == "failed" and not (tmp_path / "other/metrics.json").exists()


def test_the_service_is_told_and_closed(tmp_path, monkeypatch):
    calls = []

    class Service(RunLogger):
        def start(self, run_dir, info):
            calls.append(("start", info["config"]["task"]["tokens"]))

        def log_metrics(self, metrics, step=None):
            calls.append(("row", step))

        def close(self, exit_code, summary):
            calls.append(("close", exit_code, summary["decode/slowdown@8"]))
            return []

    build = procedure.build.build
    monkeypatch.setattr(procedure.build, "build", lambda node, *a, **k: build(node, *a, **k) if node else Service())
    train(config(tmp_path), tmp_path / "run")
    assert calls == [("start", 2), ("row", 0), ("row", 1), ("row", 2), ("close", 0, 1.0)]


def test_the_two_protocols_are_told_apart():
    assert is_procedure(compose("train", ["task=decode_cost"]).task) and not is_procedure(compose("train", []).task)
    with pytest.raises(NotImplementedError):
        Procedure().run(None)  # type: ignore[arg-type]


def test_preflight_says_that_there_is_nothing_to_rehearse(tmp_path):
    with pytest.raises(UserError, match=r"^preflight: this task trains nothing"):
        preflight(config(tmp_path), tmp_path / "run", {"model": "samba"})


def test_text_holds_what_no_label_holds(tmp_path):
    """A text in which hardly anything counts in the loss is still read whole."""
    words = ["data=synthetic", "data.kind=pairs", "data.length=127", "data.seq_len=128", "data.val_documents=2", "data.train_documents=8"]
    found = {}
    for share in ("1.0", "0.125"):
        data = build_data(compose("train", [*words, "data.loss_on=all", f"data.prompt_share={share}"]))
        data.prepare(tmp_path / "cache")
        found[share] = text_ids(data, 3 * 128, 1, "task.positions").tolist()
    said = [data.tokenizer.eot_id, *data.tokenizer.encode("".join(data.examples()[0]))]
    assert said == found["1.0"][:128] == found["0.125"][:128] and found["1.0"][:256] == found["0.125"][:256]
