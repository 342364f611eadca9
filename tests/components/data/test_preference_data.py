"""Preference pairs: how they lie in rows and batches, what is a label, what is held out, and what is refused."""

import json

import pytest

from components.contracts import IGNORE, UserError
from components.data.chat import turns
from components.data.preference import PreferenceData
from components.data.tokenizers import ASSISTANT, END, USER, bytes_tokenizer

EOT = bytes_tokenizer().eot_id
OPTIONS = {
    "tokenizer": {"kind": "bytes", "vocab_size": 300, "path": None}, "seq_len": 16, "batch_size": 2, "form": "text", "too_long": "cut",
    "val_fraction": 0.2, "val_path": None, "encoding_errors": "strict", "num_workers": 0,
}  # fmt: skip
ROWS = [{"prompt": f"q{i}=", "chosen": f"yes {i}", "rejected": f"no {i}!"} for i in range(20)]


def prepared(folder, rows, **changes):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PreferenceData(path=str(path), **(OPTIONS | changes))
    data.prepare(folder / "cache")
    return data


def texts(batch):
    """(prompt and answer, answer) of every row, read from inputs and labels; the end mark is shown as $."""
    decode = bytes_tokenizer().decode
    found = []
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist()):
        assert ids[0] == EOT
        answer = [i for i in labels if i != IGNORE]
        end = ids.index(EOT, 1) if EOT in ids[1:] else len(ids)
        found.append((decode(ids[1:end]), decode(answer[:-1]) + ("$" if answer[-1] == EOT else decode(answer[-1:]))))
    return found


def all_pairs(batches):
    """(chosen row, rejected row) of every pair."""
    found = [texts(batch) for batch in batches]
    return [both for rows in found for both in zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True)]


def test_chosen_rows_come_first_and_only_answers_are_labels(tmp_path):
    data = prepared(tmp_path, ROWS)
    batch = next(iter(data.train_stream(0)))
    assert batch.input_ids.shape == (4, 16) and data.batch_size == 4
    for (chosen, answer), (rejected, worse) in all_pairs([batch]):
        number = chosen.partition("=")[0][1:]
        assert (chosen, answer) == (f"q{number}=yes {number}", f"yes {number}$")
        assert (rejected, worse) == (f"q{number}=no {number}!", f"no {number}!$")
    assert batch.loss_tokens == int((batch.labels != IGNORE).sum())
    ends = (batch.labels == EOT).nonzero()[:, 1]  # the padding after the end is a segment of its own
    for row, end in enumerate(ends.tolist()):
        assert set(batch.segment_ids[row, : end + 1].tolist()) == {0} and set(batch.segment_ids[row, end + 1 :].tolist()) == {1}


def test_held_out_pairs_are_whole_and_never_trained_on(tmp_path):
    data = prepared(tmp_path, ROWS)
    held_out, stream = all_pairs(data.val_batches()), data.train_stream(0)
    trained = [pair for _ in range(3) for pair in all_pairs(stream)]
    prompts = [{row[0].partition("=")[0] for row, _ in pairs} for pairs in (held_out, trained)]
    assert len(held_out) == len(prompts[0]) == data.summary()["val_pairs"] > 0
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 20
    assert sum(len(batch.input_ids) for batch in data.val_batches()) == 2 * len(held_out)
    facts = data.summary()
    assert (facts["pairs"], data.val_bytes, data.baselines(), data.evaluations()) == (20, 0, {}, {})


@pytest.mark.parametrize("form", ["text", "chat"])
def test_pairs_of_one_prompt_stay_together(tmp_path, form):
    rows = [{"prompt": f"q{i}=", "chosen": f"y{i}", "rejected": f"n{j}"} for i in range(20) for j in range(3)]
    data = prepared(tmp_path, rows, form=form)
    parts = [{row[0].partition("=")[0] for row, _ in all_pairs(b)} for b in (data.val_batches(), data.train_stream(0))]
    assert parts[0] and not parts[0] & parts[1] and data.summary()["val_pairs"] == 3 * len(parts[0])


def test_held_out_file_of_its_own(tmp_path):
    (tmp_path / "val.jsonl").write_text(json.dumps({"prompt": "v=", "chosen": "a", "rejected": "b"}))
    data = prepared(tmp_path, ROWS, val_path=str(tmp_path / "val.jsonl"))
    assert all_pairs(data.val_batches()) == [(("v=a", "a$"), ("v=b", "b$"))]


@pytest.mark.parametrize("taken", [1, 7, 8, 9])
def test_stream_goes_on_exactly(tmp_path, taken):
    data = prepared(tmp_path, ROWS)

    def epochs(stream):
        while True:
            yield from stream

    first, second = data.train_stream(3), data.train_stream(3)
    walk = epochs(first)
    for _ in range(taken):
        next(walk)
    second.load_state_dict(first.state_dict())
    again = epochs(second)
    for _ in range(10):
        assert next(walk).input_ids.tolist() == next(again).input_ids.tolist()


def test_ranks_share_the_pairs(tmp_path):
    data = prepared(tmp_path, ROWS)
    seen = [row[0] for rank in (0, 1) for row, _ in all_pairs(data.train_stream(0, rank=rank, world_size=2))]
    assert len(seen) == len(set(seen)) == 2 * 2 * len(data.train_stream(0, world_size=2))


def test_long_answers_are_cut_and_counted(tmp_path, capsys):
    long = {"prompt": "p=", "chosen": "c" * 30, "rejected": "r"}
    data = prepared(tmp_path, [*ROWS, long])
    assert "of 21 pairs 1 cut" in capsys.readouterr().err and data.summary()["truncated"] == 1
    pairs = [*all_pairs(data.val_batches()), *all_pairs(data.train_stream(0))]
    (cut,) = [chosen for chosen, _ in pairs if chosen[0].startswith("p=")] or [("p=" + "c" * 13, "c" * 14)]  # unless it fills no batch
    assert cut == ("p=" + "c" * 13, "c" * 14)  # no end mark: the answer goes on
    data = prepared(tmp_path, [*ROWS, long], too_long="drop")
    assert "1 left out" in capsys.readouterr().err and data.summary()["pairs"] == 20


def test_too_long_prompts_are_refused_or_dropped(tmp_path):
    rows = [*ROWS, *({"prompt": "p" * 38 + f"{i:02}", "chosen": f"a{i}", "rejected": "b"} for i in range(20))]
    with pytest.raises(UserError, match=r"data.seq_len: 16; \d+ of \d+ pairs do not differ within a row.* 4[34] tokens.*too_long=drop"):
        prepared(tmp_path, rows)
    assert prepared(tmp_path, rows, too_long="drop").summary()["left_out"] == 20
    with pytest.raises(UserError, match=r"data.too_long: drop; all \d+ pair\(s\) are longer"):
        prepared(tmp_path, rows[20:], too_long="drop")


def test_answers_that_begin_alike_beyond_a_row_are_refused(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "x" * 20 + "a", "rejected": "x" * 20 + "b"} for i in range(8)]
    with pytest.raises(UserError, match="their answers begin alike"):
        prepared(tmp_path, rows)


def test_chat_form_asks_as_data_chat_does(tmp_path):
    """A text is the user's turn; messages and whole conversations give the same rows; only the last answer counts."""
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]

    def answer(text):
        return {"role": "assistant", "content": text}

    rows = [
        {"prompt": before, "chosen": [answer("d")], "rejected": [answer("e")]},
        {"prompt": before, "chosen": "d", "rejected": "e"},
        {"chosen": [*before, answer("d")], "rejected": [*before, answer("e")]},
    ]
    (tmp_path / "val.jsonl").write_text(json.dumps(rows[2]))
    data = prepared(tmp_path, rows[:2], form="chat", val_path=str(tmp_path / "val.jsonl"), batch_size=1, seq_len=32)
    batches = [*data.val_batches(), *data.train_stream(0)]
    assert len(batches) == 3 and all(batch.input_ids.tolist() == batches[0].input_ids.tolist() for batch in batches)
    tokenizer = bytes_tokenizer()
    prompt = data.render(before)
    for row, text in enumerate("de"):
        ids, labels = batches[0].input_ids[row].tolist(), batches[0].labels[row].tolist()
        assert ids[: len(prompt)] == prompt
        assert [i for i in labels if i != IGNORE] == [*tokenizer.encode(text), tokenizer.special_id(END), EOT]
        assert labels[: len(prompt) - 1] == [IGNORE] * (len(prompt) - 1)
    assert [p.text for p in turns(before[:1], "all", "")] == [USER, "a", END] and prompt[-1] == tokenizer.special_id(ASSISTANT)


def test_text_form_renders_no_turns(tmp_path):
    assert not hasattr(prepared(tmp_path, ROWS), "render")


@pytest.mark.parametrize(
    ("row", "form", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "text", "line 2 has no rejected, only prompt, chosen; a pair needs"),
        ({"chosen": "b", "rejected": "c"}, "text", "line 2 has no prompt, only chosen, rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "text", "line 2: chosen and rejected are the same"),
        (
            {"prompt": "a", "chosen": ["b"], "rejected": "c"},
            "text",
            "line 2: chosen holds list, not text; conversations need data.form=chat",
        ),
        ({"prompt": "", "chosen": "", "rejected": "c"}, "text", "line 2: prompt and chosen are both empty"),
        ({"chosen": "b", "rejected": "c"}, "chat", "line 2: chosen must end in an assistant's message after a prompt"),
        (
            {"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"},
            "chat",
            "line 2: chosen must end in an assistant's",
        ),
        ({"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": "c"}, "chat", "line 2: message 1 is"),
        (
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "rejected": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "c"}],
            },
            "chat",
            "line 2: chosen and rejected are conversations that differ before their last message",
        ),
    ],
)
def test_bad_rows_are_one_line(tmp_path, row, form, message):
    with pytest.raises(UserError) as error:
        prepared(tmp_path, [ROWS[0], row], form=form)
    assert message in str(error.value) and "\n" not in str(error.value) and "pairs.jsonl" in str(error.value)


def test_other_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no text; every file or row in it is empty"):
        prepared(tmp_path, [])
    with pytest.raises(UserError, match="one document cannot be split"):
        prepared(tmp_path, ROWS[:1])
    (tmp_path / "plain.txt").write_text("no pairs")
    data = PreferenceData(path=str(tmp_path / "plain.txt"), **OPTIONS)
    with pytest.raises(UserError, match="plain text holds no pairs"):
        data.prepare(tmp_path / "cache")
    with pytest.raises(UserError, match=r"data.form: 'chats' is not one of text, chat; did you mean 'chat'"):
        prepared(tmp_path, ROWS, form="chats")
    with pytest.raises(UserError, match=r"data.batch_size: 50 pairs x 1 process\(es\); only \d+ pair\(s\) to train on"):
        prepared(tmp_path, ROWS, batch_size=50).train_stream(0)
