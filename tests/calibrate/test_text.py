"""Windows drawn from text files."""

import gzip
import json

import numpy as np
import pytest

from nybble.calibrate.text import draw
from nybble.errors import ArgumentError, FormatError


class Letters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text, add_special_tokens):
        assert add_special_tokens is False
        return [ord(letter) for letter in text]


def test_windows_are_pieces_of_the_text_and_follow_the_seed(tmp_path):
    text = "".join(chr(100 + i % 700) for i in range(4000))
    (tmp_path / "a.txt").write_text(text)
    first = draw([tmp_path / "a.txt"], Letters(), tokens=55, context=10, seed=3)
    again = draw([tmp_path / "a.txt"], Letters(), tokens=55, context=10, seed=3)
    other = draw([tmp_path / "a.txt"], Letters(), tokens=55, context=10, seed=4)
    assert first.windows.shape == (6, 10)
    assert np.array_equal(first.windows, again.windows)
    assert first.digest == again.digest != other.digest
    for window in first.windows:
        assert "".join(map(chr, window)) in text
    facts = first.to_json()
    assert (facts["tokens"], facts["windows"], facts["seed"]) == (60, 6, 3)
    assert list(facts["files"]) == ["a.txt"]


def test_all_kinds_of_files_give_the_same_text(tmp_path):
    (tmp_path / "plain.txt").write_text("abcdefghij" * 30)
    with gzip.open(tmp_path / "zipped.txt.gz", "wt") as file:
        file.write("abcdefghij" * 30)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "abcdefghij" * 30}) + "\n")
    sets = [
        draw([tmp_path / name], Letters(), tokens=40, context=20, seed=0)
        for name in ("plain.txt", "zipped.txt.gz", "rows.jsonl")
    ]
    assert sets[0].digest == sets[1].digest
    assert sets[2].windows.shape == (2, 20)


def test_no_token_is_taken_twice_and_a_small_file_gives_what_it_has(tmp_path):
    text = "".join(chr(1000 + i) for i in range(95))
    (tmp_path / "a.txt").write_text(text)
    found = draw([tmp_path / "a.txt"], Letters(), tokens=10_000, context=10, seed=0)
    # One piece of 80 characters and one of 15: eight windows and one.
    assert found.windows.shape == (9, 10)
    assert len(np.unique(found.windows)) == 90


def test_several_files_are_mixed(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 2000)
    (tmp_path / "b.txt").write_text("b" * 2000)
    both = [tmp_path / "a.txt", tmp_path / "b.txt"]
    found = draw(both, Letters(), tokens=200, context=10, seed=0)
    assert set(found.windows[:, 0]) == {ord("a"), ord("b")}


@pytest.mark.parametrize("content", [b"", b"too short"])
def test_text_shorter_than_a_window_is_an_error(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ArgumentError, match=r"a\.txt: expected text of at least 16 tokens, found"):
        draw([tmp_path / "a.txt"], Letters(), tokens=16, context=16, seed=0)


def test_what_is_no_text_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(FormatError, match="UTF-8"):
        draw([tmp_path / "a.txt"], Letters(), tokens=16, context=16, seed=0)
    with pytest.raises(FileNotFoundError, match="absent"):
        draw([tmp_path / "absent"], Letters(), tokens=16, context=16, seed=0)


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"context": 1}, {"seed": -1}])
def test_numbers_out_of_range_are_named(tmp_path, wrong):
    (tmp_path / "a.txt").write_text("a" * 100)
    settings = {"tokens": 10, "context": 10, "seed": 0, **wrong}
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        draw([tmp_path / "a.txt"], Letters(), **settings)
    with pytest.raises(ArgumentError, match="text file"):
        draw([], Letters(), tokens=10, context=10, seed=0)
