"""Reading, validating and splitting interaction logs."""

from __future__ import annotations

import doctest
import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrec_llm import data
from genrec_llm.data import Interactions, leave_last_two_out, read_interactions
from genrec_llm.errors import DataError
from genrec_llm.tables import read_catalogue

STRANGE_IDS = [
    "with space",
    ' "quoted", it\'s ',
    "emoji 🛒🧴",
    "007",
    "NA",
    "null",
    "x" * 300,
    "a,b\tc|d",
    "-1",
]


def log_of(text: str) -> Interactions:
    """`"u1: a b c; u2: b d"` as an interaction log without times."""
    rows = [(user, item) for line in text.split(";") for user, items in [line.split(":")] for item in items.split()]
    users, items = zip(*rows, strict=True)
    return Interactions.from_log("toy", pd.DataFrame({"user": [user.strip() for user in users], "item": items}))


def write_csv(path: Path, table: pd.DataFrame) -> None:
    table.to_csv(path, index=False)


def write_tsv(path: Path, table: pd.DataFrame) -> None:
    table.to_csv(path, index=False, sep="\t")


def write_jsonl(path: Path, table: pd.DataFrame) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_dict("records")), "utf-8")


def write_parquet(path: Path, table: pd.DataFrame) -> None:
    table.to_parquet(path)


WRITERS = {".csv": write_csv, ".tsv": write_tsv, ".jsonl": write_jsonl, ".parquet": write_parquet}


def problems_of(path: Path, **options: object) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_interactions(path, **options)  # type: ignore[arg-type]
    return caught.value.problems


def written(folder: Path, text: str, name: str = "log.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITERS)
def test_strange_ids_survive_every_format(tmp_path: Path, suffix: str) -> None:
    table = pd.DataFrame({"user": STRANGE_IDS, "item": STRANGE_IDS[::-1], "timestamp": range(len(STRANGE_IDS))})
    WRITERS[suffix](tmp_path / f"log{suffix}", table)
    interactions = read_interactions(tmp_path / f"log{suffix}")
    assert interactions.users == STRANGE_IDS
    assert interactions.frame["item"].tolist() == STRANGE_IDS[::-1]


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_gzipped_file_reads_as_the_plain_one(tmp_path: Path, suffix: str) -> None:
    plain, packed = tmp_path / f"log{suffix}", tmp_path / f"log{suffix}.gz"
    WRITERS[suffix](plain, pd.DataFrame({"user": ["a", "a"], "item": [1, 2], "timestamp": [1, 2]}))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    pd.testing.assert_frame_equal(read_interactions(plain).frame, read_interactions(packed).frame)
    assert read_interactions(packed).name == "log"


@pytest.mark.parametrize("suffix", WRITERS)
def test_numeric_ids_become_text_without_a_fraction(tmp_path: Path, suffix: str) -> None:
    table = pd.DataFrame({"user": [7.0, 7.0, 8.0], "item": [10, 11, 10], "timestamp": [1, 2, 3]})
    WRITERS[suffix](tmp_path / f"log{suffix}", table)
    assert read_interactions(tmp_path / f"log{suffix}").sequences() == {"7": ["10", "11"], "8": ["10"]}


def test_a_json_log_may_mix_numbers_and_text(tmp_path: Path) -> None:
    path = written(tmp_path, '{"user": 1, "item": "a"}\n\n{"user": "1", "item": 12345678901234567890}\n', "log.jsonl")
    assert read_interactions(path).sequences() == {"1": ["a", "12345678901234567890"]}


def test_sequence_lines_are_oldest_first_and_repeats_are_kept(tmp_path: Path) -> None:
    path = written(tmp_path, "u2 5 3 5\r\n\nu1 3\nu2 9\n", "log.txt")
    interactions = read_interactions(path)
    assert interactions.sequences() == {"u2": ["5", "3", "5", "9"], "u1": ["3"]}
    assert "timestamp" not in interactions.frame


def test_rows_are_ordered_by_time_and_ties_keep_the_order_of_the_file(tmp_path: Path) -> None:
    rows = "user,item,timestamp\nb,x3,20\na,y2,5\nb,x1,10\nb,x2,10\na,y1,1\nb,x4,20\nb,x0,9.5\n"
    interactions = read_interactions(written(tmp_path, rows))
    assert interactions.sequences() == {"b": ["x0", "x1", "x2", "x3", "x4"], "a": ["y1", "y2"]}
    assert interactions.frame["timestamp"].dtype == "float64"


def test_many_ties_keep_the_order_of_the_file(tmp_path: Path) -> None:
    items = [f"i{number}" for number in np.random.default_rng(0).permutation(500)]
    write_csv(tmp_path / "log.csv", pd.DataFrame({"user": "u", "item": items, "timestamp": 86400}))
    assert read_interactions(tmp_path / "log.csv").sequences() == {"u": items}


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (["1700000000", "1.5"], [1700000000.0, 1.5]),
        (["2024-01-02", "2024-01-01T00:00:00.25Z"], [1704153600.0, 1704067200.25]),
        (["2024-01-01 02:00:00+02:00", "1969-12-31 23:59:59"], [1704067200.0, -1.0]),
        (["03/01/2024 10:00", "31/01/2024 10:00"], [1704276000.0, 1706695200.0]),
        (["Jan 03 2024", "Feb 01 2024"], [1704240000.0, 1706745600.0]),
        (["2024-01-02", "9999-12-31"], [1704153600.0, 253402214400.0]),
        (["0001-01-01T00:00:00", "2024-01-02"], [-62135596800.0, 1704153600.0]),
    ],
)
def test_times_may_be_seconds_or_dates(tmp_path: Path, times: list[str], expected: list[float]) -> None:
    rows = "".join(f"{user},i,{time}\n" for user, time in zip("ab", times, strict=True))
    frame = read_interactions(written(tmp_path, f"user,item,timestamp\n{rows}")).frame
    assert frame["timestamp"].tolist() == expected


@pytest.mark.parametrize("zone", [None, "UTC"])
def test_a_parquet_log_may_have_real_times(tmp_path: Path, zone: str | None) -> None:
    times = pd.to_datetime(["2024-01-01 00:00:02.5", "9999-12-31", "2024-01-01 00:00:01.0"], format="ISO8601").as_unit(
        "us"
    )
    log = pd.DataFrame({"user": "u", "item": ["b", "never", "a"], "timestamp": times.tz_localize(zone)})
    write_parquet(tmp_path / "log.parquet", log)
    interactions = read_interactions(tmp_path / "log.parquet")
    assert interactions.sequences() == {"u": ["a", "b", "never"]}
    assert interactions.frame["timestamp"].tolist() == [1704067201.0, 1704067202.5, 253402214400.0]


def test_without_a_time_column_the_file_is_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, "user,item\nu,b\nu,a\nu,b\n")
    with caplog.at_level(logging.INFO, logger="genrec_llm"):
        assert read_interactions(path).sequences() == {"u": ["b", "a", "b"]}
    assert "order in time" in caplog.text


def test_other_column_names_are_told_by_options(tmp_path: Path) -> None:
    path = written(tmp_path, "who,what,when,rating\nu,b,2,5\nu,a,1,1\n")
    interactions = read_interactions(path, user_column="who", item_column="what", time_column="when", name="shop")
    assert interactions.sequences() == {"u": ["a", "b"]}
    assert interactions.name == "shop"
    ignoring_times = read_interactions(path, user_column="who", item_column="what", time_column=None)
    assert ignoring_times.sequences() == {"u": ["b", "a"]}


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeffuser,item,timestamp\n\nu,a,1\n\n")
    assert read_interactions(path).sequences() == {"u": ["a"]}


# --- the item file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_item_file_adds_text_and_cold_items(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, "user,item,timestamp\nu,1,1\nu,2,2\n")
    items = pd.DataFrame(
        {
            "item": [2, 1, 3],
            "title": ["Two", None, "Three"],
            "attributes": [["a", "b"], [], ["c"]],
            "price": [1, 2, 3],
        }
    )
    WRITERS[suffix](tmp_path / f"items{suffix}", items)
    catalogue = read_interactions(path, items_path=tmp_path / f"items{suffix}").catalogue
    assert catalogue.to_dict("list") == {
        "item": ["2", "1", "3"],
        "title": ["Two", None, "Three"],
        "categories": ["a, b", None, "c"],
    }


def test_a_csv_item_file_may_use_the_name_of_the_item_column(tmp_path: Path) -> None:
    path = written(tmp_path, "user,asin\nu,1\n")
    items = written(tmp_path, 'asin,title,categories\n1,"Soap, green",Bath\n2,,\n', "items.csv")
    catalogue = read_interactions(path, item_column="asin", items_path=items).catalogue
    assert catalogue.to_dict("list") == {
        "item": ["1", "2"],
        "title": ["Soap, green", None],
        "categories": ["Bath", None],
    }


def test_items_without_a_row_in_the_item_file_are_added(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, "user,item\nu,1\nu,new\n")
    items = written(tmp_path, '{"item": 1, "title": "One"}\n', "items.jsonl")
    catalogue = read_interactions(path, items_path=items).catalogue
    assert catalogue.to_dict("list") == {"item": ["1", "new"], "title": ["One", None]}
    assert "'new'" in caplog.text


def test_half_a_surrogate_pair_in_a_title_becomes_a_question_mark(tmp_path: Path) -> None:
    items = written(tmp_path, '{"item": 1, "title": "a\\ud800b", "categories": ["\\ud800"]}\n', "items.jsonl")
    assert read_catalogue(items).to_dict("list") == {"item": ["1"], "title": ["a?b"], "categories": ["?"]}


def test_repeated_items_and_absent_columns_of_the_item_file_are_named(tmp_path: Path) -> None:
    repeated = written(tmp_path, '{"item": 1}\n{"item": 2}\n{"item": "1"}\n', "repeated.jsonl")
    with pytest.raises(DataError, match=r"repeated\.jsonl: 1 repeated item \(line 3: '1'\)"):
        read_catalogue(repeated)
    nameless = written(tmp_path, '{"sku": 1}\n', "nameless.jsonl")
    with pytest.raises(DataError, match=r"no column 'item'; the columns are 'sku'.*--item-column"):
        read_catalogue(nameless)


def test_problems_of_both_files_come_together(tmp_path: Path) -> None:
    log = written(tmp_path, "user,item,timestamp\nu,1,later\n")
    items = written(tmp_path, "item,title\n1,a\n1,b\n", "items.csv")
    first, second = problems_of(log, items_path=items)
    assert "log.csv" in first and "'later'" in first
    assert "items.csv" in second and "repeated" in second


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log.csv", "log.tsv", "log.jsonl", "log.txt"])
@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_called_empty(tmp_path: Path, name: str, text: str) -> None:
    assert any("no interactions" in problem for problem in problems_of(written(tmp_path, text, name)))


def test_a_file_with_a_header_alone_is_called_empty(tmp_path: Path) -> None:
    assert problems_of(written(tmp_path, "user,item,timestamp\n")) == [
        f"{tmp_path}/log.csv: no interactions in the file"
    ]


def test_missing_columns_are_named_with_those_there_and_the_option(tmp_path: Path) -> None:
    problems = problems_of(written(tmp_path, "uid,iid,when\nu,i,1\n"), time_column="time")
    assert len(problems) == 3
    for problem, column, option in zip(problems, ("user", "item", "time"), ("user", "item", "time"), strict=True):
        assert f"no column '{column}'; the columns are 'uid', 'iid', 'when'" in problem
        assert f"--{option}-column" in problem


def test_times_that_are_none_are_counted_and_placed(tmp_path: Path) -> None:
    bad = ["now", "", "inf", "1e"]
    rows = "".join(f"u,i{row},{time}\n" for row, time in enumerate(["1", *bad, "2", "3", "4", "-5"]))
    (problem,) = problems_of(written(tmp_path, f"user,item,timestamp\n{rows}"))
    assert "4 values cannot be read as a time (line 3: 'now', line 4: '', line 5: 'inf', ...)" in problem
    assert "column 'timestamp'" in problem


@pytest.mark.parametrize(
    ("times", "told"),
    [
        (
            ["05/05/2024", "06/03/2024", "07/02/2024"],
            "dates such as '06/03/2024' can be read in two ways, and are read month",
        ),
        (["05/03/2024", "06/03/2024", "17/02/2024"], ""),
        (["2024-03-05", "2024-03-06", "2024-02-07"], ""),
        (["2024/03/05", "2024/03/06", "2024/02/07"], ""),
        (["Mar 05 2024", "Mar 06 2024", "Feb 07 2024"], ""),
        (["1700000000000", "1700000001000", "1700000002000"], "no seconds, but milliseconds"),
        (["1700000000", "1700000001", "1700000002"], ""),
    ],
)
def test_times_that_may_be_meant_otherwise_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, times: list[str], told: str
) -> None:
    rows = "".join(f"u,i{row},{time}\n" for row, time in enumerate(times))
    path = written(tmp_path, f"user,item,timestamp\n{rows}")
    read_interactions(path)
    assert all(f"{path}: column 'timestamp': {told}" in record.getMessage() for record in caplog.records)
    assert len(caplog.records) == bool(told)


def test_another_separator_is_named(tmp_path: Path) -> None:
    told = "Its fields seem to be separated by semicolons: a .csv has commas, a .tsv tabs."
    assert told in problems_of(written(tmp_path, "user;item;timestamp\nu;a;1\n"))[0]
    assert told in problems_of(written(tmp_path, "user;item;timestamp\nu;a,b;1\n"))[0]


def test_dates_in_two_formats_are_refused_and_not_guessed(tmp_path: Path) -> None:
    (problem,) = problems_of(written(tmp_path, "user,item,timestamp\nu,a,2024-01-01\nu,b,2024-01-02\nu,c,01.02.2024\n"))
    assert "line 4: '01.02.2024'" in problem


@pytest.mark.parametrize(("suffix", "place"), [(".csv", "line 3"), (".jsonl", "line 2"), (".parquet", "row 2")])
def test_missing_ids_are_placed_in_the_units_of_the_format(tmp_path: Path, suffix: str, place: str) -> None:
    WRITERS[suffix](
        tmp_path / f"log{suffix}",
        pd.DataFrame({"user": ["u", "v"], "item": ["i", None], "timestamp": [1, 2]}),
    )
    (problem,) = problems_of(tmp_path / f"log{suffix}")
    assert "column 'item': 1 value empty" in problem and place in problem


def test_line_breaks_inside_quotes_count_as_lines(tmp_path: Path) -> None:
    rows = 'user,item,"no\nte"\nu,a,"x\ny\r\nz"\n\n,b,q\nv,,"1\n2"\nw,,\n'
    user, item = problems_of(written(tmp_path, rows))
    assert "line 7: ''" in user
    assert "line 8: '', line 10: ''" in item


def test_rows_with_too_many_fields_are_told_with_all_other_problems(tmp_path: Path) -> None:
    long, user, item = problems_of(written(tmp_path, 'user,item\nu,"a\nb"\nu,b,3\n,c\n\nu,d,e,f\nv\nv,e\n'))
    assert "2 rows with more than 2 fields (line 4: 'u,b,3', line 7: 'u,d,e,f'); a row has as many" in long
    assert "column 'user': 1 value empty" in user and "(line 5: '')" in user
    assert "column 'item': 1 value empty" in item and "(line 8: '')" in item


def test_the_place_of_a_quote_that_does_not_end_is_counted_in_rows(tmp_path: Path) -> None:
    (problem,) = problems_of(written(tmp_path, 'user,item\nu,"a\nb"\nu,"c,3\n'))
    assert "row 3 (the header is row 1)" in problem


@pytest.mark.parametrize("more", ["", "u,a,b,1,2,3\n"])
def test_two_columns_of_the_wanted_name_are_refused(tmp_path: Path, more: str) -> None:
    long = ["1 row with more than 5 fields"] if more else []
    path = written(tmp_path, f"user,item,item,note,note\nu,a,b,1,2\n{more}")
    assert [problem.split(" (")[0] for problem in problems_of(path)] == [
        f"{path}: {problem}" for problem in (*long, "2 columns 'item': rename those that are not meant")
    ]
    assert "2 columns 'note'" in problems_of(path, item_column="note")[-1]
    assert "no column 'item.1'" in problems_of(path, item_column="item.1")[-1]


def test_two_columns_of_a_name_that_is_not_wanted_are_left(tmp_path: Path) -> None:
    assert read_interactions(written(tmp_path, "user,item,note,note\nu,a,1,2\n")).sequences() == {"u": ["a"]}
    table = read_catalogue(
        written(tmp_path, "asin,item,item,attributes,attributes,categories\n1,,,a,b,c\n", "items.csv"),
        item_column="asin",
    )
    assert table.to_dict("records") == [{"item": "1", "categories": "c"}]
    with pytest.raises(DataError, match="2 columns 'attributes'"):
        read_catalogue(written(tmp_path, "item,attributes,attributes\n1,a,b\n", "items.csv"))


@pytest.mark.parametrize("blank", ["\n", "\r\n", "\n\n\n"])
def test_blank_lines_before_the_header_are_skipped_and_counted(tmp_path: Path, blank: str) -> None:
    path = written(tmp_path, "")
    path.write_bytes(f"{blank}user,item\nu,a\n".encode())
    assert read_interactions(path).sequences() == {"u": ["a"]}
    path.write_bytes(f"{blank}user,item\nu,\n".encode())
    assert f"line {blank.count(chr(10)) + 2}: ''" in problems_of(path)[0]
    path.write_bytes(f"{blank}user,item\nu,a,b\n".encode())
    assert f"line {blank.count(chr(10)) + 2}: 'u,a,b'" in problems_of(path)[0]


def test_a_very_long_header_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, f"user,item,{'x' * 140_000}\nu,a,1\n")
    assert read_interactions(path).sequences() == {"u": ["a"]}


def test_two_columns_of_the_wanted_name_are_refused_in_parquet(tmp_path: Path) -> None:
    columns = [pa.array(["u"]), pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["user", "item", "item"]), tmp_path / "log.parquet")
    assert problems_of(tmp_path / "log.parquet") == [
        f"{tmp_path}/log.parquet: 2 columns 'item': rename those that are not meant"
    ]


def test_equal_rows_are_refused_and_dropped_on_request(tmp_path: Path) -> None:
    path = written(tmp_path, "user,item,timestamp\nu,a,1\nu,b,1\nu,a,1.0\nu,a,2\n")
    (problem,) = problems_of(path)
    assert "1 row equal to an earlier one" in problem
    assert "line 4: user 'u' item 'a'" in problem and "--drop-duplicates" in problem
    assert read_interactions(path, drop_duplicates=True).sequences() == {"u": ["a", "b", "a"]}


def test_dropping_duplicates_without_times_is_refused(tmp_path: Path) -> None:
    for path in (written(tmp_path, "user,item\nu,a\nu,a\n"), written(tmp_path, "u a a\n", "log.txt")):
        (problem,) = problems_of(path, drop_duplicates=True)
        assert "--drop-duplicates needs times" in problem


def test_all_problems_of_a_file_come_at_once(tmp_path: Path) -> None:
    rows = "user,item,timestamp\nu,a,1\nu,a,1\n,b,2\nu,,3\nu,c,never\nu,d,5\n"
    problems = problems_of(written(tmp_path, rows))
    assert len(problems) == 4
    for words in ("column 'user'", "column 'item'", "cannot be read as a time", "equal to an earlier one"):
        assert sum(words in problem for problem in problems) == 1


def test_broken_json_lines_come_with_the_other_problems(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '{"user": "u", "item": {}}\n{"user": "u", "item"\n[1]\n{"user": true, "item": 1}\n',
        "log.jsonl",
    )
    problems = problems_of(path)
    assert "2 lines without a whole json object (line 2: " in problems[0]
    assert "column 'user': 1 value" in problems[1] and "line 4: True" in problems[1]
    assert "column 'item': 1 value" in problems[2] and "line 1: {}" in problems[2]


def test_half_a_surrogate_pair_is_no_id(tmp_path: Path) -> None:
    (problem,) = problems_of(written(tmp_path, '{"user": "\\ud800", "item": 1}\n', "log.jsonl"))
    assert "column 'user': 1 value" in problem and "line 1" in problem


def test_a_line_with_a_user_alone_is_placed(tmp_path: Path) -> None:
    (problem,) = problems_of(written(tmp_path, "u1 a b\nu2\n", "log.txt"))
    assert "1 line with a user and no item (line 2: 'u2')" in problem


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("u,a,1\nu,b,2,3\n", "1 row with more than 3 fields (line 3: 'u,b,2,3')"),
        ("u,a,1,3\nu,b,2,3\n", "2 rows with more than 3 fields"),
        ('u,"a,1\nu,b,2\n', "cannot be read as a table"),
    ],
)
def test_ragged_and_unclosed_rows_are_refused(tmp_path: Path, rows: str, told: str) -> None:
    (problem,) = problems_of(written(tmp_path, f"user,item,timestamp\n{rows}"))
    assert told in problem and "a row has as many fields as the header" in problem


def test_files_that_are_not_what_their_name_says_are_refused(tmp_path: Path) -> None:
    (tmp_path / "log.parquet").write_bytes(b"user,item\n")
    assert "not a parquet file" in problems_of(tmp_path / "log.parquet")[0]
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(b"user,item\nu,a\n" * 99)[:-20])
    assert "cannot be read" in problems_of(tmp_path / "log.csv.gz")[0]
    (tmp_path / "log.csv").write_bytes(b"user,item\nu,caf\xe9\n")
    assert "line 2 is not UTF-8" in problems_of(tmp_path / "log.csv")[0]
    assert "unknown kind of file" in problems_of(written(tmp_path, "", "log.xlsx"))[0]
    assert "no such file" in problems_of(tmp_path / "absent.csv")[0]
    (tmp_path / "folder.csv").mkdir()
    assert "cannot be read" in problems_of(tmp_path / "folder.csv")[0]


# --- Interactions -------------------------------------------------------------------------------------------


def test_a_log_and_a_catalogue_that_do_not_fit_are_refused() -> None:
    frame = pd.DataFrame({"user": ["u", "v", "u"], "item": ["a", "b", "c"]})
    catalogue = pd.DataFrame({"item": ["a", "a", "b"]})
    with pytest.raises(DataError) as caught:
        Interactions("toy", frame, catalogue)
    assert len(caught.value.problems) == 3
    with pytest.raises(DataError, match="no column item"):
        Interactions("toy", frame[["user"]], catalogue)


def test_k_core_is_repeated_until_nothing_changes() -> None:
    # Item c leaves (one interaction), so user w is left with one, so item b, so user v.
    interactions = log_of("u: a a d d; v: a b; w: b c")
    core = interactions.k_core(2)
    assert core.sequences() == {"u": ["a", "a", "d", "d"]}
    assert core.catalogue["item"].tolist() == ["a", "d"]
    assert interactions.k_core(1).fingerprint() == interactions.fingerprint()


def test_k_core_drops_cold_items_and_says_so_and_keeps_text(caplog: pytest.LogCaptureFixture) -> None:
    log = pd.DataFrame({"user": ["u"], "item": ["a"]})
    catalogue = pd.DataFrame({"item": ["cold", "a"], "title": ["Cold", "A"]})
    core = Interactions.from_log("toy", log, catalogue).k_core(1)
    assert core.catalogue.to_dict("list") == {"item": ["a"], "title": ["A"]}
    assert "--k-core 1: 1 item without interactions left out of the catalogue" in caplog.text


def test_a_k_core_that_leaves_nothing_says_so() -> None:
    with pytest.raises(DataError, match="--k-core 3 leaves none of 4 interactions"):
        log_of("u: a b; v: a b").k_core(3)
    with pytest.raises(DataError, match="--k-core 0"):
        log_of("u: a b").k_core(0)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_k_core_agrees_with_a_plain_loop(k: int) -> None:
    rng = np.random.default_rng(k)
    log = pd.DataFrame({"user": rng.integers(0, 60, 400), "item": rng.integers(0, 80, 400)}).astype(str)
    rows = list(log.itertuples(index=False, name=None))
    while True:
        users, items = [user for user, _ in rows], [item for _, item in rows]
        kept = [(u, i) for u, i in rows if users.count(u) >= k and items.count(i) >= k]
        if kept == rows:
            break
        rows = kept
    core = Interactions.from_log("random", log).k_core(k)
    assert sorted(core.frame.itertuples(index=False, name=None)) == sorted(rows)
    assert core.frame["user"].value_counts().min() >= k
    assert core.frame["item"].value_counts().min() >= k


def test_the_fingerprint_follows_ids_and_order_but_not_text() -> None:
    base = log_of("u: a b; v: b")
    assert base.fingerprint() == log_of("u: a b; v: b").fingerprint()
    for other in ("u: b a; v: b", "u: a b; w: b", "u: a; v: b b", "u: a b b; v: b"):
        assert base.fingerprint() != log_of(other).fingerprint()
    titled = Interactions("toy", base.frame, pd.DataFrame({"item": ["b", "a"], "title": ["B", "A"]}))
    assert base.fingerprint() == titled.fingerprint()
    with_cold = Interactions("toy", base.frame, pd.DataFrame({"item": ["a", "b", "c"]}))
    assert base.fingerprint() != with_cold.fingerprint()


# --- the split ----------------------------------------------------------------------------------------------


def test_the_last_two_items_are_the_targets() -> None:
    splits = leave_last_two_out(log_of("u: a b c d e; v: x y z"))
    assert splits["train"].to_dict() == {"user": ["u", "v"], "items": [["a", "b", "c"], ["x"]]}
    assert splits["validation"].to_dict() == {
        "user": ["u", "v"],
        "history": [["a", "b", "c"], ["x"]],
        "target": ["d", "y"],
    }
    assert splits["test"].to_dict() == {
        "user": ["u", "v"],
        "history": [["a", "b", "c", "d"], ["x", "y"]],
        "target": ["e", "z"],
    }


def test_users_with_too_few_interactions_are_counted_and_the_mend_named() -> None:
    with pytest.raises(DataError) as caught:
        leave_last_two_out(log_of("a: 1 2; b: 1 2 3; c: 1; d: 2 3; e: 1"))
    (problem,) = caught.value.problems
    assert "4 users with fewer than 3 interactions ('a' has 2, 'c' has 1, 'd' has 2, ...)" in problem
    assert "--k-core 3" in problem


def test_targets_are_never_among_the_rows_of_train() -> None:
    """Interactions are tagged with their row, so that an item taken again cannot hide a leak."""
    rng = np.random.default_rng(0)
    log = pd.DataFrame({"user": rng.integers(0, 50, 1000).astype(str), "timestamp": rng.integers(0, 9, 1000)})
    log["item"] = [f"row{row}" for row in range(len(log))]
    interactions = Interactions.from_log("rows", log)
    splits = leave_last_two_out(interactions)
    time_of = dict(zip(log["item"], log["timestamp"], strict=True))
    assert splits["train"]["user"] == splits["validation"]["user"] == splits["test"]["user"]
    for user, train, validation, test in zip(
        interactions.users, splits["train"], splits["validation"], splits["test"], strict=True
    ):
        rows = [*train["items"], validation["target"], test["target"]]
        assert rows == interactions.sequences()[user]
        assert len(set(rows)) == len(rows)
        assert validation["history"] == train["items"]
        assert test["history"] == [*train["items"], validation["target"]]
        assert [time_of[row] for row in rows] == sorted(time_of[row] for row in rows)


def test_the_split_has_the_declared_types() -> None:
    import datasets

    splits = leave_last_two_out(log_of("u: a b c"))
    text, texts = datasets.Value("string"), datasets.List(datasets.Value("string"))
    assert splits["train"].features == {"user": text, "items": texts}
    assert splits["test"].features == {"user": text, "history": texts, "target": text}
    assert [str(split.split) for split in splits.values()] == ["train", "validation", "test"]


# --- the module ---------------------------------------------------------------------------------------------


def test_data_modules_import_neither_torch_nor_transformers_nor_datasets() -> None:
    heavy = "{'torch', 'transformers', 'datasets'}"
    code = f"import sys, genrec_llm.sources, genrec_llm.vocab; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(data).failed == 0
