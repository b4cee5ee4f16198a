"""Reading evaluation text: every form gives the same string, every damage names its place."""

import gzip
import json

import pytest

from nybble.errors import FormatError, MissingFileError, NybbleError
from nybble.eval import read_text, text
from nybble.eval.text import read_rows

ROWS = ["", " = Title = \n", "Žluťoučký kůň,\r\nzwei\n", 'a "quoted" row']


def write(path, data):
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a", "a.utf8.gz", "a.TXT"])
def test_plain_text_is_kept_to_the_last_byte(tmp_path, name):
    content = "eins\r\nzwei\n\n\tdrei ✓"
    assert read_text(write(tmp_path / name, content)) == content


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "wiki.test.jsonl"])
def test_rows_are_joined_with_two_newlines(tmp_path, name):
    lines = [json.dumps({"text": row, "other": 1}) for row in ROWS]
    content = "\n".join([lines[0], "", *lines[1:]])  # an empty line is no row
    assert read_text(write(tmp_path / name, content)) == "\n\n".join(ROWS)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.txt", b"good \xff bad", "expected UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}', "expected UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text"', "line 2: expected a JSON object"),
        ("a.jsonl", '{"text": "a"}\n\n[1]', "line 3: expected .*found list"),
        ("a.jsonl", '{"txt": "a"}', r"line 1: expected .*found keys \['txt'\]"),
        ("a.jsonl", '{"text": 3}', "line 1: expected"),
        ("a.jsonl", "[" * 100_000, "line 1: expected a JSON object"),
    ],
)
def test_damage_is_named(tmp_path, name, data, says):
    path = write(tmp_path / name, data)
    with pytest.raises(FormatError, match=says) as caught:
        read_text(path)
    assert str(path) in str(caught.value)


def test_gzip_that_is_none_or_cut(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(b"not gzip")
    with pytest.raises(FormatError, match="expected gzip data"):
        read_text(path)
    path.write_bytes(gzip.compress(b"x" * 10_000)[:-10])
    with pytest.raises(FormatError, match="expected gzip data"):
        read_text(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(MissingFileError, match=r"none\.txt"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(NybbleError, match="directory"):
        read_text(tmp_path)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_a_small_file_with_much_text_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(text, "MAX_CHARS", 5000)
    row = "x" * 6000 if name == "a.txt.gz" else json.dumps({"text": "x" * 3000}) + "\n"
    with pytest.raises(NybbleError):
        read_text(write(tmp_path / name, row * 2))


def test_rows_come_with_their_lines_and_no_further_than_asked(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", '{"a": 1}\n\n{"b": [2]}\nnot json\n')
    rows = read_rows(path)
    assert [next(rows), next(rows)] == [(1, {"a": 1}), (3, {"b": [2]})]
    with pytest.raises(FormatError, match="line 4: expected a JSON object"):
        next(rows)
