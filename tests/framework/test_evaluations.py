"""Further held-out batches at the end of a run, rows without a document mask, and runs that stop when they have learned enough."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from components.contracts import IGNORE, Batch, UserError
from components.data.documents import Piece
from components.data.synthetic import KINDS, ProbeBatches, draw
from components.data.tokenizers import bytes_tokenizer
from framework import build
from framework.build import load_run
from framework.callbacks.early_stop import EarlyStop
from framework.checkpoint import checkpoints
from framework.logging import read_rows
from framework.runs import read_state
from tests.framework.training import Killed, config, final_state, history, same, train


def test_lengths_are_measured_on_the_same_tokens(tmp_path, capsys):
    metrics = train(config(tmp_path, "data.document_mask=false", "data.eval_lengths=[32,100,250]"), tmp_path / "run")
    assert "length_250: loss" in capsys.readouterr().out
    run = load_run(tmp_path / "run")
    text = (tmp_path / "val.txt").read_text()
    tokens = torch.tensor([run.tokenizer.eot_id, *run.tokenizer.encode(text)])[:251]  # 300 bytes fill one row of 250
    for length in (32, 100, 250):
        nll, right = [], []
        for start in range(0, 250, length):
            row = tokens[start : min(start + length, 250) + 1]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                hidden = run.model(Batch(row[None, :-1])).hidden
                logits = run.model.logits(hidden)[0].float()
            nll.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
            right.append((logits.argmax(1) == row[1:]).sum())
        assert metrics[f"eval/length_{length}/loss"] == pytest.approx(float(sum(nll)) / 250, rel=2e-3)  # bf16 logits of another kernel
        assert metrics[f"eval/length_{length}/accuracy"] == pytest.approx(float(sum(right)) / 250, abs=0.02)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics


def test_without_a_document_mask_a_row_is_one_text(tmp_path):
    (tmp_path / "t").mkdir()
    for i in range(40):
        (tmp_path / "t" / f"{i}.txt").write_text(f"doc {i}")
    words = [f"data.path={tmp_path / 't'}", "data.val_path=null", "data.val_fraction=0.2"]
    for mask in (True, False):
        data = build.build_data(config(tmp_path, *words, f"data.document_mask={str(mask).lower()}"))
        data.prepare(tmp_path / "cache")
        for batch in (next(iter(data.train_stream(1))), next(iter(data.val_batches()))):
            assert (batch.segment_ids is not None) == (batch.position_ids is not None) == mask
            assert (batch.input_ids == data.tokenizer.eot_id).sum() > 4  # rows do hold several documents


def test_longer_than_the_held_out_text_is_one_line_before_anything_is_trained(tmp_path):
    with pytest.raises(UserError, match=r"data\.eval_lengths: 400; the held-out text has only 30\d tokens"):
        train(config(tmp_path, "data.eval_lengths=[400]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_probe_batches_ask_for_the_answer_alone():
    tokenizer = bytes_tokenizer()
    texts = [(Piece("ab?", loss=False), Piece("C")), (Piece("abcde?", loss=False), Piece("DE"))]
    (batch,) = ProbeBatches(texts, tokenizer, rows=4)
    e = tokenizer.eot_id
    a, b, c, d, ee, q, C, D, E = tokenizer.encode("abcde?CDE")
    assert batch.input_ids.tolist() == [[e, a, b, q, e, e, e, e], [e, a, b, c, d, ee, q, D]]
    assert batch.labels.tolist() == [[IGNORE] * 3 + [C] + [IGNORE] * 4, [IGNORE] * 6 + [D, E]]


def test_recall_probes_can_be_answered():
    for prompt, answer in draw(KINDS["recall"][0], 64, 200, seed=3):
        assert len(prompt + answer) == 64 and prompt.endswith("?")
        assert prompt[prompt.index("#") + 1] == answer and sum(c.isupper() for c in prompt) == 1
        rest = prompt[:-1].replace(f"#{answer}", "")
        assert all((ord(y) - ord(x)) % 8 == 1 for x, y in pairwise(rest))  # the filler runs on behind the mark
    depths = {prompt.index("#") for prompt, _ in draw(KINDS["recall"][0], 16, 500, seed=3)}
    assert depths == set(range(13))


# --------------------------------------------------------------------------------------------------------------- early stop


def losses(folder, *words):
    train(config(folder, "trainer.log_every_n_steps=1", *words), folder / "run")
    return [row["train/loss"] for row in read_rows(folder / "run")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Training losses of twelve steps that nothing stops."""
    return losses(tmp_path_factory.mktemp("whole"))


def test_a_run_stops_where_the_mean_of_the_last_losses_is_low(tmp_path, whole):
    limit = sum(whole[3:6]) / 3 + 1e-6  # met after step 6, not before: the losses fall
    got = losses(tmp_path, f"stop.train_loss_below={limit}", "stop.steps=3")
    assert got == whole[:6]
    state = read_state(tmp_path / "run")
    assert state["status"] == "done" and state["step"] == 6
    assert [path.name for path in checkpoints(tmp_path / "run")][-1] == "step000006.ckpt"
    assert "val/loss" in read_rows(tmp_path / "run")[-1]


def test_stopping_goes_on_from_a_checkpoint_as_it_was(tmp_path, whole, monkeypatch):
    limit = sum(whole[3:6]) / 3 + 1e-6
    words = (f"stop.train_loss_below={limit}", "stop.steps=3", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    first = config(tmp_path, *words)
    train(first, tmp_path / "a")
    count = 0

    def die(self, trainer, *rest):
        nonlocal count
        count += 1
        if count == 5:  # after the checkpoint of step 4, before the losses are enough
            raise Killed
        return original(self, trainer, *rest)

    original = EarlyStop.on_train_batch_end
    monkeypatch.setattr(EarlyStop, "on_train_batch_end", die)
    with pytest.raises(Killed):
        train(first, tmp_path / "b")
    monkeypatch.undo()
    train(first, tmp_path / "b", resuming=True)
    assert history(tmp_path / "a") == history(tmp_path / "b")
    assert same(final_state(tmp_path / "a", 6)["state_dict"], final_state(tmp_path / "b", 6)["state_dict"])
