"""Incremental decoding and stop strings."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.runtime.text import StopScanner, TextDecoder


def byte_decode(ids):
    return bytes(ids).decode(errors="replace")


@settings(deadline=None)
@given(st.text(max_size=40))
def test_pieces_joined_are_the_text(text):
    decoder = TextDecoder(byte_decode)
    pieces = [decoder.push(byte) for byte in text.encode()]
    assert "".join(pieces) + decoder.finish() == text


@settings(deadline=None)
@given(st.text(max_size=40))
def test_no_piece_holds_half_a_character(text):
    text = text.replace("\ufffd", "")
    decoder = TextDecoder(byte_decode)
    pieces = [decoder.push(byte) for byte in text.encode()]
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_text_come_out_in_the_end_and_in_between():
    decoder = TextDecoder(byte_decode)
    pieces = [decoder.push(byte) for byte in b"a\xff\xff\xff\xff\xff\xff\xffb\xe2\x82"]
    text = "".join(pieces) + decoder.finish()
    assert text.startswith("a\ufffd")
    assert "b" in text
    assert text.endswith("\ufffd")


def sentence_decode(ids):
    """Decode as SentencePiece does: the first word's leading space is dropped."""
    return "".join(f" {'ab'[i]}" for i in ids)[1:]


def test_the_context_keeps_the_leading_space():
    assert TextDecoder(sentence_decode).push(0) == "a"
    decoder = TextDecoder(sentence_decode, context=[1])
    assert [decoder.push(0), decoder.push(1)] == [" a", " b"]


def test_a_context_that_begins_inside_a_character_is_shortened():
    decoder = TextDecoder(byte_decode, context="€€€x".encode())
    assert decoder.push(ord("y")) == "y"


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["ab", "cd"], ["x"], "abcd"),
        (["ab", "cd"], ["bc"], "a"),
        (["a", "b", "c", "d"], ["bcd"], "a"),
        (["a", "b", "c", "e"], ["bcd"], "abce"),
        (["ababab", "ac"], ["abac"], "abab"),
        (["xSTOPySTOP"], ["STOP"], "x"),
        (["one two three"], ["three", "two"], "one "),
        (["aa", "b"], ["aab", "ab"], ""),
    ],
)
def test_stop_strings_are_cut_off(pieces, stops, shown):
    scanner = StopScanner(stops)
    out = ""
    for piece in pieces:
        out += scanner.push(piece)
    assert out + scanner.finish() == shown


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=3)))
def test_the_scanner_agrees_with_a_search_of_the_whole(pieces, stops):
    scanner = StopScanner(stops)
    out = ""
    stopped_early = False
    for piece in pieces:
        out += scanner.push(piece)
        stopped_early = stopped_early or scanner.stopped
    out += scanner.finish()
    whole = "".join(pieces)
    ends = [whole.find(stop) for stop in stops if stop in whole]
    assert stopped_early == bool(ends)
    if not ends:
        assert out == whole
    else:
        # The scanner stops at the one complete first, a search at the one that begins first.
        assert whole.startswith(out)
        assert not any(stop in out for stop in stops)
