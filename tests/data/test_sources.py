"""Check that every kind of source gives its rows back, and names the place that it cannot read."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetNotFoundError

from megalora.data.rows import open_rows

# U+2028 ends a line for str.splitlines, but not in JSON Lines, where it may stand in a string.
ROWS = [{"question": f"q{i}", "answer": f"a{i} é\u2028"} for i in range(5)]


def read_rows(source):
    """All rows of a source, and a check that their chunks count them right."""
    rows = open_rows(source)
    read = []
    for chunk in rows.chunks():
        assert chunk.first == len(read) + 1
        read += chunk.rows()
    assert len(read) == len(rows)
    return read


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return str(path)


@pytest.fixture
def jsonl(tmp_path):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    # Empty lines between the rows and a blank one at the end, as editors and scripts leave them.
    return write(tmp_path / "train.jsonl", "\n\n".join(lines) + "\n  \n")


def test_jsonl_and_slices(jsonl):
    assert read_rows(jsonl) == ROWS
    for text, part in {
        "[:2]": ROWS[:2],
        "[3:]": ROWS[3:],
        "[1:3]": ROWS[1:3],
        "[-1:]": ROWS[-1:],
        "[:]": ROWS,
    }.items():
        assert read_rows(jsonl + text) == part


# A list, and SQuAD's form: an object with a list in it.
@pytest.mark.parametrize("tree", [ROWS, {"version": 1, "data": ROWS}])
def test_json(tmp_path, tree):
    # With a byte order mark, as Windows programs write it, and over many lines.
    text = "\ufeff" + json.dumps(tree, indent=1)
    assert read_rows(write(tmp_path / "a.json", text)) == ROWS


def test_parquet(tmp_path):
    # Nested values come out as Python's lists and dicts, as from JSON.
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows * 3), tmp_path / "a.parquet")
    assert read_rows(f"{tmp_path}/a.parquet[1:]") == rows * 2


def test_hub(monkeypatch):
    # Nothing is asked over the network here: what matters is what the hub would be asked for.
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("org/name") == ROWS
    # org/name/config:split[slice]
    assert read_rows("org/na-me.2/main:test[1:3]") == ROWS[1:3]
    assert asked == [("org/name", None, "train"), ("org/na-me.2", "main", "test")]


def test_hub_failure_keeps_the_reason(monkeypatch):
    def load_dataset(*_, split):
        raise DatasetNotFoundError(f"no {split} today")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = (
        r"org/name: no such file, and the hub data set org/name \(config default, split train\)"
        r" could not be loaded:"
    )
    with pytest.raises(ValueError, match=message + r"\n  no train today"):
        read_rows("org/name")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"a": 1}\n\n{"a": "b" "c"}\n',
            r"a.jsonl:3: not valid JSON \(Expecting ',' delimiter, column 11\)$",
        ),
        ("a.jsonl", '{"a": 1,\n', r"a.jsonl:1: not valid JSON \(.*, column 9\)$"),
        ("a.jsonl", "[1, 2]\n", r"a.jsonl:1: must be a JSON object, got list \[1, 2\]"),
        (
            "a.jsonl",
            # Lines and bytes are counted as an editor shows them.
            b'{"a": 1}\n{"a": "\xff"}\n',
            r"a.jsonl:2: not UTF-8 \(invalid start byte, byte 8\)",
        ),
        ("a.jsonl", "\n", r"a.jsonl: there are no rows in it"),
        # A slice beyond the end would train on nothing.
        ("a.jsonl[7:]", '{"a": 1}\n', r"a.jsonl\[7:\]: the slice is empty; \S*a.jsonl has 1 rows"),
        (
            "a.jsonl[:10%]",
            '{"a": 1}\n',
            r"a.jsonl\[:10%\]: the slice at the end is not understood; use \[:200\]",
        ),
        # A whole file of JSON has lines, too: the parser's.
        ("a.json", '[{"a": 1},\n 2,]', r"a.json:2: not valid JSON \(.*, column \d+\)"),
        ("a.json", b'["\xff"]', r"a.json: not UTF-8 \(invalid start byte, byte 3\)"),
        ("a.json", '[{"a": 1}, 2]', r"a.json: item 2 must be a JSON object, got int 2"),
        (
            "a.json",
            '{"a": [], "b": []}',
            r"must hold exactly one list, the rows \(lists found: a, b\)",
        ),
        ("a.json", '{"a": 1}', r"must hold exactly one list, the rows \(lists found: none\)"),
        # JSON Lines under another name, with a mistake in its second line.
        ("a.json", '{"a": 1}\n{"a": 2\n', r"a.json:2: not valid JSON \("),
        (
            "a.jsonl",
            # Python keeps the last of two equal keys and says nothing.
            '{"a": [{"b": 1, "b": 2}]}\n',
            r"a.jsonl:1: a key occurs twice in an object: str 'b'; keep one$",
        ),
        ("a.json", "3", r"a.json: must be a list of objects, got int"),
        ("a.parquet", "no", r"a.parquet: not readable as Parquet \("),
        # CSV has no types: its reader would have to guess, and make a number of the answer 42.
        (
            "a.csv",
            "a,b\n",
            r"a.csv: files of type '.csv' are not read; use .jsonl, .json, .parquet",
        ),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    write(tmp_path / name.partition("[")[0], content)
    with pytest.raises(ValueError, match=message):
        read_rows(str(tmp_path / name))


def test_json_of_one_object_a_line(tmp_path):
    """``Dataset.to_json`` writes JSON Lines, whatever the file is called."""
    rows = [{"a": k, "b": [{"c": None}]} for k in range(3)]
    datasets.Dataset.from_list(rows).to_json(tmp_path / "a.json")
    assert read_rows(str(tmp_path / "a.json")) == rows
    # A single object in a single line is the file, not its first row.
    write(tmp_path / "b.json", '{"data": [{"a": 1}]}\n\n')
    assert read_rows(str(tmp_path / "b.json")) == [{"a": 1}]


def test_names_of_nothing(tmp_path, monkeypatch):
    # A file's suffix settles what was meant: a wrong path is not looked for on the hub.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError,
        match=rf"^data/a.jsonl: no such file \(looked in {tmp_path}/data\); correct data.train",
    ):
        read_rows("data/a.jsonl[:10]")
    with pytest.raises(
        ValueError,
        match=r"'my data' is neither a file nor the name of a hub data set.\n  Use a path end",
    ):
        read_rows("my data")
    with pytest.raises(
        ValueError, match=r"this is a folder; name one .jsonl, .json, .parquet file in it"
    ):
        read_rows(str(tmp_path))


def test_damaged_parquet(tmp_path):
    """A file with a changed byte, or cut off, gives rows or one line, whatever pyarrow raises."""
    path = tmp_path / "a.parquet"
    # Uncompressed, so that a changed byte reaches the parser of values instead of the decompressor.
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"a": "é", "b": [1]}]), path, compression="none"
    )
    whole = path.read_bytes()
    refused = []
    # Every seventh byte: all would take minutes.
    for place in range(0, len(whole), 7):
        flipped = bytes([whole[place] ^ 0xFF])
        for damaged in (whole[:place], whole[:place] + flipped + whole[place + 1 :]):
            path.write_bytes(damaged)
            try:
                read_rows(str(path))
            except ValueError as error:
                refused.append(str(error))
    # A cut file is never whole, because Parquet's footer stands at its end: at least one refusal
    # for each place.
    assert len(refused) > len(whole) / 7
    for message in refused:
        assert message.startswith(str(path))
        assert "\n" not in message


# Errors that pyarrow raises for some bytes, which the sample of bytes above need not meet.
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        # Its message has several lines; ours has one.
        (OSError("Couldn't deserialize thrift:\n no"), "Couldn't deserialize thrift: no"),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
            "'utf-8' codec can't decode byte 0xff",
        ),
        # A damaged length may ask for any amount of memory. This error has no message, so its name
        # is the reason.
        (MemoryError(), "MemoryError"),
    ],
)
def test_what_pyarrow_raises(tmp_path, monkeypatch, error, reason):
    def fail(*_, **how):
        raise error

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", fail)
    with pytest.raises(ValueError, match=rf"a.parquet: not readable as Parquet \({reason}"):
        read_rows(write(tmp_path / "a.parquet", "x"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # Python's parser calls itself for each bracket, and it refuses integers of more than 4,300
        # digits; neither is a JSONDecodeError.
        ("[" * 100_000, r"a.json: lists or objects are nested more than 100 deep$"),
        (
            '[{"a": ' + "1" * 5000 + "}]",
            r"a.json: holds a number of too many digits \(Exceeds the limit",
        ),
    ],
)
def test_json_that_python_chokes_on(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / "a.json", content))


def test_paths_that_cannot_be_looked_up():
    # Longer than any file system allows, an unknown user behind ~, and a zero byte: pathlib raises
    # OSError, RuntimeError and ValueError.
    for source in ("x" * 5000 + ".jsonl", "~nobody-of-this-name/a.jsonl", "a\0.jsonl"):
        with pytest.raises(
            ValueError, match=r"is not a path that can be looked up \(|no such file"
        ):
            read_rows(source)
