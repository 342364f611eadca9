"""The final files: order, columns, the same bytes whatever happened before."""

from __future__ import annotations

import hashlib
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_worker import SPACE, identity, row_of, shuffled
from test_store import fill, open_again

from components.errors import UserError
from components.store import Store, count_distinct, finish
from components.store.ids import digests_of


def final_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "final").iterdir())}


def finished(folder, rows, order, **options):
    fill(folder, order, **options)
    with open_again(folder) as store:
        store.finish(rows)
    return final_bytes(folder)


def test_rows_stand_in_input_order_and_success_names_them(tmp_path):
    files = finished(tmp_path, 50, shuffled(50, 1, 20))
    table = pq.read_table(tmp_path / "final")
    assert table["index"].to_pylist() == list(range(50))
    assert table["request_id"].to_pylist() == [identity(index) for index in range(50)]
    for index, row in enumerate(table.to_pylist()):
        want = row_of(index)
        assert {**row, "parts": json.loads(row["parts"])} == {"request_id": identity(index), "index": index, "score": None, **want}
    ids = b"".join(sorted(bytes.fromhex(identity(index)) for index in range(50)))
    sizes = {name: len(data) for name, data in files.items() if name != "_SUCCESS"}
    assert json.loads(files["_SUCCESS"]) == {"rows": 50, "ids_sha256": hashlib.sha256(ids).hexdigest(), "files": sizes} and len(sizes) == 1


def test_bytes_depend_on_the_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "GROUP_ROWS", 64)
    monkeypatch.setattr(finish, "GROUP_BYTES", 6000)
    monkeypatch.setattr(finish, "FILE_BYTES", 20_000)
    monkeypatch.setattr(finish, "OPEN_FILES", 2)
    one = finished(tmp_path / "one", 500, range(500))
    other = finished(tmp_path / "other", 500, shuffled(500, 7, 300), fsync_rows=3, shard_bytes=2000)
    assert len(one) > 3 and one == other
    tables = [pq.ParquetFile(tmp_path / "one/final" / name) for name in one if name.startswith("data")]
    sizes = [table.metadata.row_group(group).num_rows for table in tables for group in range(table.num_row_groups)]
    assert sum(sizes) == 500 and max(sizes) <= 64 and len(sizes) > len(tables)


def test_columns_and_types_follow_from_the_values(tmp_path):
    rows = [
        {"b": 1, "number": 1, "flag": True, "nothing": None, "mixed": 1, "big": 2**63, "nest": {"é": [1]}},
        {"a": "x", "number": 0.5, "flag": None, "nothing": None, "mixed": "1", "big": 1, "nest": None},
    ]
    with open_again(tmp_path) as store:
        for index in (1, 0):
            store.append(identity(index), index, rows[index])
        store.finish(2)
    table = pq.read_table(tmp_path / "final/data-00000.parquet")
    assert table.column_names == ["request_id", "index", "b", "number", "flag", "nothing", "mixed", "big", "nest", "a"]
    types = {"b": pa.int64(), "number": pa.float64(), "flag": pa.bool_(), "nothing": pa.string(), "a": pa.string()}
    assert all(table.schema.field(name).type == type_ for name, type_ in types.items())
    texts = [name for name in table.column_names if (table.schema.field(name).metadata or {}).get(b"encoding") == b"json"]
    assert texts == ["mixed", "big", "nest"]
    for index, row in enumerate(table.to_pylist()):
        found = {name: json.loads(value) if name in texts and value is not None else value for name, value in row.items()}
        assert {name: found[name] for name in rows[index]} == rows[index]


def test_a_missing_row_is_refused_or_left_out(tmp_path):
    fill(tmp_path, [0, 1, 3])
    with open_again(tmp_path) as store:
        with pytest.raises(UserError, match="1 of 4 requests have no row yet, the first is number 2 from 0"):
            store.finish(4)
        assert not (tmp_path / "final").exists()
        final = store.finish(4, missing="skip")
        assert pq.read_table(final)["index"].to_pylist() == [0, 1, 3]
        with pytest.raises(UserError, match="no row yet"):
            store.finish(4)
        store.append(identity(2), 2, row_of(2))
        assert pq.read_table(store.finish(4))["index"].to_pylist() == [0, 1, 2, 3]
        with pytest.raises(UserError, match="'drop' is not one of refuse, skip"):
            store.finish(4, missing="drop")


def test_requests_that_moved_are_noticed(tmp_path):
    with open_again(tmp_path) as store:
        store.append(identity(0), 0, row_of(0))
        store.append(identity(1), 0, row_of(1))
        with pytest.raises(UserError, match="another row of request 0"):
            store.finish(2)
        with pytest.raises(UserError, match="row of request 0, but there are 0"):
            store.finish(0)


def test_the_order_of_now_counts_and_an_older_final_is_replaced(tmp_path):
    fill(tmp_path, range(20), fsync_rows=3)
    order = [identity(index) for index in shuffled(20, 5, 7)]
    with open_again(tmp_path) as store:
        store.finish(20)
        with pytest.raises(UserError, match="number 19 when it was asked, that is not among them now"):
            store.finish(19, order=sorted(order, key=lambda name: name == identity(19))[:19])
        with pytest.raises(UserError, match=r"requests 1 and 20 .* are the same"):
            store.finish(21, order=[*order, order[1]])
        for names in (order, order[::-1], order[::-1]):
            rows = pq.read_table(store.finish(20, order=names)).to_pylist()
            assert [row["request_id"] for row in rows] == names and [row["index"] for row in rows] == list(range(20))
            assert all(
                row["prompt"] == row_of(number)["prompt"] for row in rows for number in range(20) if row["request_id"] == identity(number)
            )
        before = (tmp_path / "final/_SUCCESS").stat().st_mtime_ns
        store.finish(20, order=order[::-1])
        assert (tmp_path / "final/_SUCCESS").stat().st_mtime_ns == before
        assert pq.read_table(store.finish(21, "skip", [*order, identity(20)])).num_rows == 20
    fresh = tmp_path / "fresh"
    with open_again(fresh) as store:
        for place, name in enumerate(order):
            number = next(n for n in range(20) if identity(n) == name)
            store.append(name, place, row_of(number))
        store.finish(20, order=order)
    with open_again(tmp_path) as store:
        store.finish(20, order=order)
    assert final_bytes(fresh) == final_bytes(tmp_path)  # as if it had been asked in this order


def test_nothing_to_do_is_an_empty_table_and_a_second_finish_writes_nothing(tmp_path):
    with Store.open(tmp_path, space=SPACE) as store:
        final = store.finish(0)
        assert pq.read_table(final / "data-00000.parquet").num_rows == 0
        before = (final / "_SUCCESS").stat().st_mtime_ns
        store.finish(0)
        assert (final / "_SUCCESS").stat().st_mtime_ns == before


def test_final_files_that_are_gone_or_cut_are_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "FILE_BYTES", 1000)
    monkeypatch.setattr(finish, "GROUP_ROWS", 8)
    before = finished(tmp_path, 40, range(40))
    assert len(before) > 3
    whole = tmp_path / "final" / "data-00001.parquet"
    marker = json.loads(before["_SUCCESS"])
    del marker["files"]  # as it was written before sizes were kept
    for harm in (whole.unlink, lambda: whole.write_bytes(before[whole.name][:-1]), lambda: (whole.parent / "_SUCCESS").write_text("{"),
                 lambda: (whole.parent / "_SUCCESS").write_text(json.dumps(marker))):  # fmt: skip
        harm()
        with open_again(tmp_path) as store:
            store.finish(40)
        assert final_bytes(tmp_path) == before


def test_an_order_costs_sixteen_bytes_a_row_and_equal_requests_are_found(tmp_path):
    count = 200_000
    names = (f"{place:032x}" for place in range(count))
    tracemalloc.start()
    try:
        found = digests_of(names)
        assert tracemalloc.get_traced_memory()[1] < 40 * count  # a bytearray grows by an eighth, and is moved once more while it does
    finally:
        tracemalloc.stop()
    assert found[16:32].hex() == f"{1:032x}" and len(found) == 16 * count
    monkey = [identity(place) for place in shuffled(50, 3, 9)]
    assert count_distinct(iter(monkey)) == 50 and count_distinct([]) == 0
    with pytest.raises(UserError, match=r"^prompts: requests 7 and 50 \(from 0\) are the same"):
        count_distinct([*monkey, monkey[7]])
    many = [f"{place % 65536:032x}" for place in range(65537)]  # the two lie on both sides of a piece's end
    with pytest.raises(UserError, match="requests 0 and 65536"):
        count_distinct(many)


def test_reserved_columns_are_refused(tmp_path):
    with open_again(tmp_path) as store, pytest.raises(ValueError, match="request_id and index"):
        store.append(identity(0), 0, {"index": 3})


def test_datasets_reads_the_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    finished(tmp_path / "store", 20, range(20))
    files = str(tmp_path / "store/final/*.parquet")
    found = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert found["prompt"] == [row_of(index)["prompt"] for index in range(20)]
