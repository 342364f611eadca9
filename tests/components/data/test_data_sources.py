"""Files to documents: formats, paths, the held-out split, and every bad file as one line."""

import gzip
import json

import pytest

from components.contracts import UserError
from components.data.documents import held_out_keys, split_tail
from components.data.sources import Entry, parse_entries, text_corpora
from components.data.stdlib import StdlibCorpus, stdlib_files


def corpora(path, val_path=None, column="text", val_fraction=0.1, errors="strict"):
    return text_corpora(path, val_path, column, val_fraction, errors)


def texts(documents):
    return [document.text() for document in documents]


def all_texts(path, **options):
    return sorted(text for corpus in corpora(path, **options) for text in [*texts(corpus.train()), *texts(corpus.held_out())])


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [{"text": f"row {i}", "body": f"body {i}"} for i in range(30)]


def test_a_folder_is_read_to_any_depth_in_sorted_order_without_hidden_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("z.txt", "b/a.md", "a.py", ".hidden", ".git/config"):
        (tmp_path / name).write_text(f"{name}\n" * 20)
    (tmp_path / "empty.txt").touch()
    (corpus,) = corpora(str(tmp_path))
    assert [d.key for d in corpus.train()] == ["a.py", "b/a.md", "z.txt"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_each_row_of_a_table_is_a_document(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(ROWS), path)
    else:
        data = "\n\n".join(json.dumps(row) for row in ROWS).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    assert all_texts(str(path)) == sorted(row["text"] for row in ROWS)
    assert all_texts(str(path), column="body") == sorted(row["body"] for row in ROWS)


def test_globs_and_lists_are_read_together(tmp_path):
    for name in ("x/1.txt", "x/2.txt", "x/3.md", "y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("abc\n" * 50)
    (corpus,) = corpora([f"{tmp_path}/**/*.txt", f"{tmp_path}/x/3.md"])
    assert [d.key for d in corpus.train()] == ["x/1.txt", "x/2.txt", "y.txt", "3.md"]


def test_bytes_are_not_translated(tmp_path):
    text = "\ufeffa\r\nb\rc\n"
    (tmp_path / "t.txt").write_bytes(text.encode())
    (corpus,) = corpora(str(tmp_path / "t.txt"), val_fraction=0.5)
    assert "".join([*texts(corpus.train()), *texts(corpus.held_out())]) == text


def test_one_document_holds_out_its_tail_at_a_line(tmp_path):
    lines = [f"line {i:03d} é\n" for i in range(100)]
    (tmp_path / "input.txt").write_text("".join(lines))
    (corpus,) = corpora(str(tmp_path / "input.txt"), val_fraction=0.1)
    assert texts(corpus.train()) == ["".join(lines[:90])]
    assert texts(corpus.held_out()) == ["".join(lines[90:])]


def test_many_documents_are_held_out_whole_and_adding_one_moves_no_other(tmp_path):
    few = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {i}"} for i in range(400)])
    (corpus,) = corpora(few, val_fraction=0.1)
    held = {d.key for d in corpus.held_out()}
    assert 20 <= len(held) <= 60  # binomial: 40 +- 6
    assert not held & {d.key for d in corpus.train()}
    more = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {i}"} for i in range(500)])
    assert held == {d.key for d in corpora(more, val_fraction=0.1)[0].held_out() if int(d.key.split("#")[1]) < 400}


def test_val_path_takes_the_place_of_the_split(tmp_path):
    for name in ("one", "two", "test"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    entries = [{"path": str(tmp_path / "one.txt"), "weight": 1}, {"path": str(tmp_path / "two.txt"), "weight": 2}]
    first, second = corpora(entries, val_path=str(tmp_path / "test.txt"))
    assert (texts(first.train()), texts(second.train())) == (["one\n"], ["two\n"])
    assert (texts(first.held_out()), texts(second.held_out())) == (["test\n"], [])


@pytest.fixture
def folder(tmp_path):
    """Thirty files of one line, `sub/` holding ten of them."""
    (tmp_path / "src" / "sub").mkdir(parents=True)
    for i in range(30):
        (tmp_path / "src" / ("sub" if i % 3 == 0 else "") / f"f{i:02d}.txt").write_text(f"file {i}\n")
    return tmp_path / "src"


@pytest.mark.parametrize("again", ["{0}", "{0}/*.txt", "{0}/**/*.txt", "{0}/sub", "{0}/../src/f01.txt", "{1}", "{1}/f02.txt"])
def test_a_file_that_is_named_twice_is_one_document(folder, capsys, again):
    (folder.parent / "link").symlink_to(folder)
    (corpus,) = corpora([str(folder), again.format(folder, folder.parent / "link")], val_fraction=0.3)
    train, held_out = texts(corpus.train()), texts(corpus.held_out())
    assert sorted(train + held_out) == sorted(f"file {i}\n" for i in range(30)) and held_out
    assert capsys.readouterr().err.count("named more than once are read once\n") == 1
    assert corpus.fingerprint() == corpora(str(folder), val_fraction=0.3)[0].fingerprint()


def test_equal_names_of_different_files_are_both_read(folder):
    (folder.parent / "f01.txt").write_text("another\n")
    assert len(all_texts([str(folder), str(folder.parent / "f01.txt")])) == 31


@pytest.mark.parametrize("val", ["{}/f01.txt", "{}/sub", "{}/*2.txt", "{}/../link/f01.txt"])
def test_a_held_out_file_inside_path_is_not_trained_on(folder, capsys, val):
    (folder.parent / "link").symlink_to(folder)
    for spec in (str(folder), [{"path": f"{folder}/*[02468].txt"}, {"path": [f"{folder}/*[13579].txt", f"{folder}/sub"]}]):
        found = corpora(spec, val_path=val.format(folder))
        held_out = [t for corpus in found for t in texts(corpus.held_out())]
        train = [t for corpus in found for t in texts(corpus.train())]
        assert not set(held_out) & set(train) and len(set(train)) == len(train)
        assert sorted(train + held_out) == sorted(f"file {i}\n" for i in range(30))
        err = capsys.readouterr().err
        assert "is held out by data.val_path, not trained on\n" in err
        assert sum(corpus.size("train") for corpus in found) == sum(map(len, train))


def test_a_held_out_hub_split_is_not_trained_on(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: datasets.Dataset.from_list([{"text": split}]))
    (corpus,) = corpora(["hub:a/b", "hub:a/b::test", "hub:a/b::train"], val_path="hub:a/b::test")
    assert (texts(corpus.train()), texts(corpus.held_out())) == (["train"], ["test"])


def test_entries_share_no_file(folder, capsys):
    first, second = corpora([{"path": f"{folder}/sub"}, {"path": str(folder)}], val_fraction=0.3)
    keys = [{t for t in (*texts(c.train()), *texts(c.held_out()))} for c in (first, second)]
    assert len(keys[0]) == 10 and len(keys[1]) == 20 and not keys[0] & keys[1]
    assert "is in an entry before" in capsys.readouterr().err


def test_two_columns_of_a_table_are_two_sources(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    weighted = [{"path": path, "weight": 1}, {"path": path, "weight": 1, "column": "body"}]
    for spec in ([{"path": path}, {"path": path, "column": "body"}], weighted):
        assert all_texts(spec) == sorted(text for row in ROWS for text in row.values())


@pytest.mark.parametrize(
    ("entries", "val_path", "message"),
    [
        (["{}"], "{}", r"data.path: .*f01.txt \(and 29 more\) is held out by data.val_path.*leaves nothing"),
        (["{}/f01.txt"], "{}", "data.path: .*f01.txt is held out by data.val_path.*leaves nothing"),
        (
            [("{}", 1), ("{}/f01.txt", 3)],
            None,
            r"data.path: f01.txt is in two weighted entries \(.*/src; .*/f01.txt\); leave it out of one",
        ),
        ([("{}", None), ("{}/f01.txt", None)], None, "data.path: .*f01.txt is in an entry before .*leaves nothing"),
    ],
)
def test_overlaps_without_a_sense_are_one_line(folder, entries, val_path, message):
    spec = [e.format(folder) if isinstance(e, str) else {"path": e[0].format(folder), "weight": e[1]} for e in entries]
    with pytest.raises(UserError, match=message) as error:
        [texts(corpus.train()) for corpus in corpora(spec, val_path=val_path and val_path.format(folder))]
    assert "\n" not in str(error.value)


def test_fingerprint_follows_content_and_split_but_not_the_place(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.txt").write_text("same\n" * 9)
    prints = [corpora(str(tmp_path / folder / "t.txt"))[0].fingerprint() for folder in ("a", "b")]
    assert prints[0] == prints[1]
    assert corpora(str(tmp_path / "a/t.txt"), val_fraction=0.2)[0].fingerprint() != prints[0]
    (tmp_path / "a/t.txt").write_text("same\n" * 8 + "sane\n")
    assert corpora(str(tmp_path / "a/t.txt"))[0].fingerprint() != prints[0]


def test_large_sources_are_recognised_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr("components.data.sources.HASHED_BYTES", 3)
    monkeypatch.setattr("components.data.sources.read_bytes", None)  # must not be read
    (tmp_path / "t.txt").write_text("abcdef\n")
    before = corpora(str(tmp_path / "t.txt"))[0].fingerprint()
    (tmp_path / "t.txt").write_text("abcdefg\n")
    assert corpora(str(tmp_path / "t.txt"))[0].fingerprint() != before


def test_hub_rows_are_documents(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load(name, config, split):
        calls.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert all_texts("hub:some/name:cfg:test", column="body") == sorted(row["body"] for row in ROWS)
    assert set(calls) == {("some/name", "cfg", "test")}


def test_hub_without_network_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(name, config, split):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"data.path: hub:nobody/nothing: not to be had.*Couldn't reach.*give a file") as error:
        corpora("hub:nobody/nothing")[0].fingerprint()
    assert "\n" not in str(error.value)


def test_entries_of_every_form():
    assert parse_entries("data.path", "a.txt") == [Entry(("a.txt",))]
    assert parse_entries("data.path", ["a", "b"]) == [Entry(("a", "b"))]
    assert parse_entries("data.path", {"path": "a", "column": "body"}) == [Entry(("a",), None, "body")]
    mixed = [Entry(("a",), 3.0), Entry(("b", "c"), 0.5)]
    assert parse_entries("data.path", [{"path": "a", "weight": 3}, {"path": ["b", "c"], "weight": 0.5}]) == mixed
    assert parse_entries("data.path", {"x": {"path": "a", "weight": 3}, "y": {"path": ["b", "c"], "weight": 0.5}}) == mixed


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "data.path: None; give a file"),
        ([], r"data.path: \[\]"),
        ("", "data.path: ''"),
        (7, "data.path: 7"),
        ([{"path": "a", "wieght": 2}], r"data.path\[0\].wieght: unknown key.*did you mean 'weight'"),
        ([{"path": "a", "weight": 0}], r"data.path\[0\].weight: 0; must be a number above 0"),
        ([{"path": "a", "weight": float("nan")}], "must be a number above 0"),
        ([{"path": "a", "weight": 2}, {"path": "b"}], r"data.path\[1\].weight: missing"),
        ([{"weight": 2}], r"data.path\[0\].path: None"),
        ([3], r"data.path\[0\]: 3"),
    ],
)
def test_wrong_entries_are_one_line(spec, message):
    with pytest.raises(UserError, match=message):
        parse_entries("data.path", spec)


def bad_files(folder):
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "torn.jsonl").write_text('{"text": "a"}\n{"text": "b')
    (folder / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    (folder / "list.jsonl").write_text("[1]\n")
    (folder / "number.jsonl").write_text('{"text": 5}\n')
    (folder / "half.jsonl").write_text('{"text": "\\ud83d"}\n')
    (folder / "other.jsonl").write_text('{"content": "a", "id": 1}\n')
    (folder / "torn.parquet").write_bytes(b"PAR1 nothing more")
    (folder / "torn.txt.gz").write_bytes(gzip.compress(b"hello" * 100)[:-9])
    (folder / "plain.txt.gz").write_text("not packed")
    (folder / "empty.txt").touch()
    (folder / "nothing").mkdir()
    (folder / "blank").mkdir()
    (folder / "blank" / "a.txt").touch()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("latin.txt", r"latin.txt: byte 3 \(0xe9\) is not UTF-8"),
        ("torn.jsonl", "torn.jsonl: line 2 is not valid JSON"),
        ("latin.jsonl", "latin.jsonl: line 2, byte 10"),
        ("list.jsonl", "line 1 is a list, not an object"),
        ("number.jsonl", "data.column: 'text': .*line 1 holds int"),
        ("half.jsonl", "line 1: half a surrogate pair at character 0"),
        ("other.jsonl", "data.column: 'text': .* has only content, id"),
        ("torn.parquet", "torn.parquet: not a whole parquet file"),
        ("torn.txt.gz", "torn.txt.gz: damaged gzip"),
        ("plain.txt.gz", "plain.txt.gz: damaged gzip"),
        ("empty.txt", "empty.txt: holds no text"),
        ("nothing", "the folder holds no file"),
        ("blank", "holds no text"),
        ("latin.tx", "no such file or folder; did you mean 'latin.txt'"),
        ("*.csv", "no file matches this glob"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, message):
    bad_files(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        (corpus,) = corpora(str(tmp_path / name))
        texts(corpus.train())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["latin.txt", "half.jsonl", "latin.jsonl"])
def test_bad_bytes_can_be_replaced(tmp_path, name):
    bad_files(tmp_path)
    assert "\ufffd" in "".join(all_texts(str(tmp_path / name), errors="replace", val_fraction=0.5))


def test_parquet_without_the_column_lists_what_is_there(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist([{"texts": "a", "id": 1}]), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="has only texts, id; did you mean 'texts'"):
        all_texts(str(tmp_path / "t.parquet"))


def test_tails_begin_at_a_character_when_there_is_no_line():
    text = "é" * 100
    head, tail = split_tail(text, 0.155)
    assert head + tail == text
    assert 14 <= len(tail) <= 16
    assert split_tail("ab\ncd\n", 0.01) == ("ab\ncd\n", "")


def test_the_split_never_takes_all_or_nothing():
    keys = [f"file{i}" for i in range(50)]
    for fraction in (1e-9, 1 - 1e-9):
        assert len(held_out_keys(keys, fraction)) == (1 if fraction < 0.5 else 49)


def test_stdlib_is_the_sources_without_tests_and_tables():
    import sysconfig
    from pathlib import Path

    root = Path(sysconfig.get_path("stdlib"))
    corpus = StdlibCorpus(root, 0.025)
    train, val = list(corpus.train()), list(corpus.held_out())
    keys = [d.key for d in train] + [d.key for d in val]
    assert len(keys) == len(set(keys))
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py"} <= set(keys)
    assert not [k for k in keys if {"site-packages", "test", "tests", "idle_test", "pydoc_data"} & set(k.split("/"))]
    assert not {"encodings/cp1252.py", "encodings/cp858.py", "encodings/koi8_r.py"} & set(keys)
    assert 8e6 < sum(len(d.text().encode()) for d in train) < 12e6
    assert 120e3 < sum(len(d.text().encode()) for d in val) < 250e3
    assert corpus.fingerprint() == StdlibCorpus(root, 0.025).fingerprint()
    assert stdlib_files(root) == sorted(stdlib_files(root))


def test_a_python_without_sources_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no standard library sources; use data=text"):
        StdlibCorpus(tmp_path, 0.1).fingerprint()
