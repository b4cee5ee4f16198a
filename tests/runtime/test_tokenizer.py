"""Tokenizers from folders, damaged ones among them."""

import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.errors import (
    ArgumentError,
    FileError,
    FormatError,
    MissingFileError,
    NybbleError,
    UnsupportedError,
)
from nybble.runtime import tokenizer as module
from nybble.runtime.tokenizer import Tokenizer, from_folder
from tiny import SPECIAL, byte_level_tokenizer, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return from_folder(folder)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_decoding_undoes_encoding(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    decoder = tokenizer.stream()
    assert "".join(decoder.push(i) for i in ids) + decoder.finish() == text


def test_it_agrees_with_the_library(tokenizer):
    plain = byte_level_tokenizer()
    for text in ["", "the cat", "héllo 日本", "a\n\n  b"]:
        assert tokenizer.encode(text) == plain.encode(text).ids


def test_control_tokens_in_a_text_are_text_unless_asked_for(tokenizer):
    text = "a<|im_end|>b"
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode(text))
    assert 2 in tokenizer.encode(text, parse_special=True)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    parsed = tokenizer.encode(text, parse_special=True)
    assert tokenizer.decode(parsed) == "ab"
    assert tokenizer.decode(parsed, skip_special_tokens=False) == text


def test_what_it_knows(tokenizer):
    assert tokenizer.vocab_size == 290
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.special_tokens == {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    assert tokenizer.end_ids == (2,)
    assert tokenizer.token_id("<|im_start|>") == 1
    assert tokenizer.token(1) == "<|im_start|>"
    assert tokenizer.token_id("nothing of the kind") is None
    assert tokenizer.token(10**6) is None
    assert not tokenizer.begins
    assert "290" in repr(tokenizer)


def test_a_begin_token(tmp_path):
    write_tokenizer(tmp_path, begin=True)
    tokenizer = from_folder(tmp_path)
    assert tokenizer.begins
    assert tokenizer.encode("") == [0]
    assert tokenizer.encode("", add_special_tokens=False) == []


def test_ids_outside_the_vocabulary(tokenizer):
    assert tokenizer.decode([10**6]) == ""
    for ids in ([-1], [1 << 40]):
        with pytest.raises(ArgumentError, match="token ids"):
            tokenizer.decode(ids)
    with pytest.raises(ArgumentError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_saved_and_loaded_again(tokenizer, tmp_path):
    assert tokenizer.save(tmp_path) == [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]
    again = from_folder(tmp_path)
    assert again.encode("the cat 1") == tokenizer.encode("the cat 1")
    assert again.templates == tokenizer.templates
    assert again.special_tokens == tokenizer.special_tokens


def test_the_files_of_gpt2_s_time(tmp_path):
    backend = byte_level_tokenizer()
    content = json.loads(backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in content["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    config = {"bos_token": {"content": "<|endoftext|>"}, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer = from_folder(tmp_path)
    assert tokenizer.encode("the cat sat") == [0, *backend.encode("the cat sat").ids]
    assert tokenizer.special_ids == {0, 2}
    assert tokenizer.end_ids == (2,)
    (tmp_path / "vocab.json").write_text('{"a": -1}')
    with pytest.raises(FormatError, match="token id"):
        from_folder(tmp_path)


def test_templates_where_older_files_have_them(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}, "odd"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert from_folder(tmp_path).templates == {"default": "D", "rag": "R"}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "E"}')
    assert from_folder(tmp_path).templates["default"] == "E"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "F"}')
    (tmp_path / "chat_template.json").unlink()
    assert from_folder(tmp_path).templates == {"default": "F"}


def test_missing_and_foreign_tokenizers(tmp_path):
    with pytest.raises(MissingFileError, match=r"tokenizer\.json"):
        from_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        from_folder(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(UnsupportedError, match="SentencePiece"):
        from_folder(tmp_path)
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(FileError, match="directory"):
        from_folder(tmp_path)


def spoiled(change):
    content = json.loads(byte_level_tokenizer().to_str())
    change(content)
    return json.dumps(content)


def bad_merge(content):
    vocab = {"a": 0, "b": 1, "abababab": 2}
    content["model"] |= {"vocab": vocab, "merges": [["abababab", "abababab"]]}
    content["added_tokens"] = []


def bad_stride(content):
    content["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 7,
    }


def endless_padding(content):
    content["padding"] = {
        "strategy": {"Fixed": 10**15},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }


def bad_template(content):
    text = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "gone", "type_id": 0}}, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {},
    }


def bad_strip(content):
    content["decoder"] = {"type": "Strip", "content": "a", "start": 5, "stop": 5}


def bad_length(content):
    content["pre_tokenizer"] = {"type": "FixedLength", "length": 0}


def bad_charsmap(content):
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA////"}


SHAPES = [bad_merge, bad_stride, endless_padding, bad_template, bad_strip, bad_length, bad_charsmap]


@pytest.mark.parametrize("change", SHAPES)
def test_files_that_make_the_library_panic(change):
    text = spoiled(change)
    # Whatever the installed version does with it, nothing but nybble's errors may come out.
    try:
        tokenizer = Tokenizer(text, where="spoiled.json")
        ids = tokenizer.encode("aaaa the cat abababababababab")
        assert len(ids) < 100
        tokenizer.decode(tokenizer.encode("aaaa"))
        tokenizer.decode([0, 1, 2])
        tokenizer.encode("a", parse_special=True)
    except NybbleError as error:
        assert "spoiled.json" in str(error)  # noqa: PT017


def test_a_panic_becomes_a_format_error(tokenizer, monkeypatch):
    panic = type("PanicException", (BaseException,), {})

    class Broken:
        def encode(self, *_, **__):
            message = "index out of bounds"
            raise panic(message)

        def decode(self, *_, **__):
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "_backends", {False: Broken()})
    with pytest.raises(FormatError, match="index out of bounds"):
        tokenizer.encode("a")
    with pytest.raises(KeyboardInterrupt):
        tokenizer.decode([1])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b'{"model": ' * 500,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    ],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files(tmp_path, name, content):
    write_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content)
    if (name, content) == ("tokenizer_config.json", b"{}"):
        assert from_folder(tmp_path).end_ids == ()
        return
    with pytest.raises(FormatError, match=name.replace(".", "\\.")):
        from_folder(tmp_path)


def test_every_truncation_of_a_tokenizer_is_refused(tmp_path):
    text = byte_level_tokenizer().to_str()
    for end in range(0, len(text) - 1, 211):
        with pytest.raises(FormatError):
            Tokenizer(text[:end])


def test_files_that_are_too_large(tmp_path, monkeypatch):
    write_tokenizer(tmp_path)
    monkeypatch.setattr(module, "MAX_FILE", 1000)
    with pytest.raises(FormatError, match="at most 1000 bytes"):
        from_folder(tmp_path)


def test_special_tokens_keep_their_places():
    backend = tokenizers.Tokenizer.from_str(byte_level_tokenizer().to_str())
    assert [backend.token_to_id(token) for token in SPECIAL] == [0, 1, 2]


@pytest.mark.parametrize("name", ["nybble", "nybble.runtime", "nybble.runtime.tokenizer"])
def test_imports_are_light(name):
    code = (
        "import sys, time; start = time.process_time(); "
        f"import {name}; print(time.process_time() - start); "
        "assert not {'torch', 'transformers', 'jinja2', 'tokenizers'} & set(sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        for _ in range(3)
    ]
    assert min(float(run.stdout) for run in runs) < 0.3
