"""Preference training through the real loop: where it starts, what it moves, what it is held near, and that it resumes exactly."""

import json
import math

import pytest
import torch

from components.contracts import UserError
from framework.build import build_data, compose, load_run
from framework.engines.native import NativeEngine
from framework.logging import read_rows
from framework.tasks.dpo import PreferenceTask
from framework.tasks.lm import LanguageModelTask
from tests.framework.training import Killed, config, final_state, same, train

STEPS = 12


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("framework.train.loss_curve", lambda *args: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A trained run to start from, and 40 pairs beside it: even numbers are preferred to words."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("framework.train.loss_curve", lambda *args: None)
        train(config(folder), folder / "run")
    rows = [{"prompt": f"{i} times ", "chosen": f"{2 * i} is", "rejected": f"word {'x' * (i % 5)}"} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def dpo_config(base, *words):
    """12 steps of 4 pairs in rows of 32 bytes."""
    return compose(
        "train",
        [
            "model/size=test", "task=dpo", "data=preference", f"data.path={base / 'pairs.jsonl'}", f"ckpt={base / 'run'}",
            "data.seq_len=32",
            f"model.max_length={load_run(base / 'run').cfg.model.max_length}", "data.tokenizer.kind=bytes", "data.val_fraction=0.2",
            f"trainer.max_steps={STEPS}", "checkpoint.every_steps=4", "validate.every_steps=4", "samples.every_steps=0", "logger=none",
            f"paths.cache_dir={base / 'cache'}", *words,
        ],
    )  # fmt: skip


def test_it_starts_at_the_reference_and_learns_the_preference(base, tmp_path):
    metrics = train(dpo_config(base, "validate.at_start=true"), tmp_path / "run")
    before, *rows = read_rows(tmp_path / "run")
    assert before["val/loss"] == pytest.approx(math.log(2), abs=1e-6) and before["val/dpo/margin"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert metrics["val/loss"] < 0.6 and metrics["val/dpo/accuracy"] == 1.0
    assert metrics["val/dpo/chosen_reward"] > metrics["val/dpo/rejected_reward"]
    assert metrics["val/dpo/margin"] == pytest.approx(metrics["val/dpo/chosen_reward"] - metrics["val/dpo/rejected_reward"])
    assert "val/bits_per_byte" not in metrics and {"train/dpo/accuracy", "train/dpo/margin"} <= set(rows[-1])
    last = final_state(tmp_path / "run", STEPS)  # read without running code; of the reference it holds 16 digits
    assert (
        set(last["state_dict"]) == {f"model.{name}" for name in load_run(base / "run").model.state_dict()} and len(last["reference"]) == 16
    )


def test_validation_is_the_mean_over_pairs_of_the_two_engines_scores(base, tmp_path):
    """Against log-probabilities that the decoding engine gives for the same tokens under both runs."""
    run = tmp_path / "run"
    metrics = train(dpo_config(base, "trainer.precision=32-true", "task.beta=0.3"), run)
    policy, reference = load_run(run), load_run(base / "run")
    prepared = build_data(dpo_config(base))
    prepared.prepare(base / "cache", reference.tokenizer)
    margins = []
    for batch in prepared.val_batches():
        sums = []
        for model in (policy.model, reference.model):
            rows = []
            for ids, labels in zip(batch.input_ids, batch.labels):
                counted = (labels != -100).nonzero()[:, 0]
                sequence = [*ids[: counted[-1] + 1].tolist(), int(labels[counted[-1]])]
                rows.append(NativeEngine(model, policy.tokenizer).score([sequence])[0][counted].double().sum())
            sums.append(torch.stack(rows))
        ratio = sums[0] - sums[1]
        margins.append(0.3 * (ratio[: len(ratio) // 2] - ratio[len(ratio) // 2 :]))
    margin = torch.cat(margins)
    assert metrics["val/dpo/margin"] == pytest.approx(margin.mean().item(), abs=1e-3)
    assert metrics["val/loss"] == pytest.approx(-torch.nn.functional.logsigmoid(margin).mean().item(), abs=1e-4)


def test_an_adapter_switched_off_is_the_reference(base, tmp_path):
    """No second model, and the base does not move."""
    seen = []
    metrics = train(dpo_config(base, "adapter=lora", "optimizer=adamw", "optimizer.lr=1e-2"), tmp_path / "run")
    assert metrics["val/dpo/accuracy"] == 1.0 and metrics["val/loss"] < 0.6
    state, start = final_state(tmp_path / "run", STEPS), load_run(base / "run").model.state_dict()
    for name, tensor in state["state_dict"].items():
        name = name.removeprefix("model.").replace(".base_layer.", ".")
        if "lora_" not in name:
            assert torch.equal(tensor, start[name]), name
            seen.append(name)
    assert len(seen) == len(start) and "reference" not in state


LORA = ("trainer.accumulate_grad_batches=2", "adapter=lora", "adapter.dropout=0.2")


@pytest.mark.parametrize("words", [(), pytest.param(LORA, marks=pytest.mark.slow)], ids=["plain", "lora inside a window"])
def test_killed_and_resumed_equals_never_killed(base, tmp_path, monkeypatch, words):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(dpo_config(base, *words), whole)
    original, calls = PreferenceTask.training_step, [0]

    def dies(self, batch, batch_idx):
        calls[0] += 1
        if calls[0] == (15 if words else 7):
            raise Killed
        return original(self, batch, batch_idx)

    monkeypatch.setattr(PreferenceTask, "training_step", dies)
    with pytest.raises(Killed):
        train(dpo_config(base, *words), killed)
    monkeypatch.setattr(PreferenceTask, "training_step", original)
    train(dpo_config(base, *words), killed, resuming=True)
    first, second = ([{k: v for k, v in row.items() if k[:4] in ("trai", "val/", "opt/")} for row in read_rows(r)] for r in (whole, killed))
    assert first == second and len(first) == STEPS
    a, b = final_state(whole, STEPS), final_state(killed, STEPS)
    assert all(same(a[key], b[key]) for key in ("state_dict", "optimizer_states", "lr_schedulers", "rng", "global_step"))


def test_resume_refuses_another_reference(base, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(dpo_config(base, "trainer.max_steps=4"), run)
    monkeypatch.setattr("framework.tasks.dpo.digest", lambda model: "another")
    with pytest.raises(UserError, match="no longer holds the weights that this run is compared with"):
        train(dpo_config(base, "trainer.max_steps=8"), run, resuming=True)


def test_accumulated_micro_batches_equal_one_batch(base, tmp_path):
    """8 pairs at once, and twice 4: the same pairs, so the same steps."""
    held_out = tmp_path / "val.jsonl"
    held_out.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}')
    shared = (f"data.val_path={held_out}", "trainer.max_steps=4", "trainer.precision=32-true", "task.label_smoothing=0.1")
    for name, words in (("one", ("data.batch_size=8",)), ("two", ("data.batch_size=4", "trainer.accumulate_grad_batches=2"))):
        train(dpo_config(base, *shared, *words), tmp_path / name)
    one, two = (read_rows(tmp_path / name) for name in ("one", "two"))
    assert one[0]["opt/grad_norm"] == pytest.approx(two[0]["opt/grad_norm"], rel=1e-4)
    assert one[-1]["train/loss"] == pytest.approx(two[-1]["train/loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=dpo", "data=preference", "data.path=x.jsonl"], "ckpt: null; this task starts from a trained run"),
        (["task=dpo", "ckpt=x"], "task: compares two answers to a prompt, and this data option holds no such pairs; use data=preference"),
        (["data=preference", "data.path=x.jsonl"], "data: holds pairs of answers, which this task cannot compare; use task=dpo"),
    ],
)
def test_what_does_not_go_together_is_one_line(words, message):
    with pytest.raises(UserError) as error:
        compose("train", words)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "task.beta: 0.0; must be a finite number above 0"),
        ({"label_smoothing": 0.5}, "task.label_smoothing: 0.5; must be at least 0 and below 0.5"),
        ({"nll_weight": -1.0}, "task.nll_weight: -1.0; must be a finite number of at least 0"),
        ({"reference": None}, "task.reference: null"),
    ],
)
def test_numbers_out_of_range(changes, message):
    options = {"reference": "anywhere", "beta": 0.1, "label_smoothing": 0.0, "nll_weight": 0.0, "normalise": "sum"} | changes
    with pytest.raises(UserError, match=message):
        PreferenceTask(torch.nn.Linear(1, 1), None, None, 0, **options)


def test_language_model_task_takes_no_pairs():
    assert not LanguageModelTask.takes_pairs and PreferenceTask.takes_pairs
