"""Loading, logits, generation, streaming, chat."""

import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nybble
from nybble.errors import (
    ArgumentError,
    ConfigError,
    ContextError,
    FormatError,
    MissingFileError,
    NybbleError,
    TokenError,
    UnsupportedError,
)
from tiny import write_llama, write_tokenizer

PROMPT = "the cat sat on"


def greedy(model, ids, n):
    """Continue by the definition: the best token of the last row, again and again."""
    out = list(ids)
    for _ in range(n):
        out.append(int(model.forward(out)[-1].argmax()))
    return out[len(ids) :]


def test_what_a_model_knows(tiny, tiny_folder):
    assert tiny.info["family"] == "llama"
    assert (tiny.vocab_size, tiny.context) == (290, 512)
    assert tiny.end_ids == (2,)
    assert tiny.path == tiny_folder
    assert tiny.has_tokenizer
    assert "llama" in repr(tiny)


def test_logits(tiny):
    ids = [5, 6, 7, 8]
    logits = tiny.forward(ids)
    assert logits.shape == (4, 290)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    # A row depends on what came before it and on nothing else, to the bit.
    assert np.array_equal(tiny.forward(ids[:2]), logits[:2])
    assert np.array_equal(tiny(np.array(ids)), logits)
    assert np.array_equal(tiny.forward(np.array([ids], dtype=np.int32)), logits)
    assert not np.array_equal(tiny.forward([9, 6, 7, 8])[-1], logits[-1])


def test_sessions_continue(tiny):
    ids = [5, 6, 7, 8, 9]
    whole = tiny.forward(ids)
    session = tiny.session()
    assert session.forward(ids[:2], "none").shape == (0, 290)
    assert np.array_equal(session.forward(ids[2:4], "all"), whole[2:4])
    assert np.array_equal(session.forward(ids[4:]), whole[4:])
    assert len(session) == 5
    assert session.tokens == ids
    session.truncate(3)
    assert np.array_equal(session.forward(ids[3:], "all"), whole[3:])
    for n in (-1, 6):
        with pytest.raises(ArgumentError):
            session.truncate(n)
    with pytest.raises(ArgumentError, match="last"):
        session.forward([1], "first")


def test_greedy_is_the_argmax_of_the_logits(tiny):
    ids = tiny.tokenizer.encode(PROMPT)
    result = tiny.generate(ids, 12, ignore_end=True)
    assert result.tokens == greedy(tiny, ids, 12)
    assert result.finish_reason == "length"
    assert result.prompt_tokens == len(ids)
    assert result.metrics["prefill_tokens"] == len(ids)
    assert result.metrics["generated_tokens"] == 12
    assert str(result) == result.text


def test_text_and_tokens_give_the_same(tiny):
    ids = tiny.tokenizer.encode(PROMPT)
    by_text = tiny.generate(PROMPT, 10)
    assert by_text.tokens == tiny.generate(ids, 10).tokens
    assert by_text.tokens == tiny.generate(np.array(ids), 10).tokens
    assert by_text.tokens == tiny.generate(np.array([ids]), 10).tokens
    assert by_text.text == tiny.tokenizer.decode(ids + by_text.tokens)[len(PROMPT) :]


def test_the_stream_is_the_text(tiny):
    whole = tiny.generate(PROMPT, 40, temperature=1.0, seed=3)
    stream = tiny.stream(PROMPT, 40, temperature=1.0, seed=3)
    assert stream.finish_reason is None
    pieces = list(stream)
    assert "".join(pieces) == whole.text
    assert all(pieces)
    assert stream.tokens == whole.tokens
    assert stream.finish_reason == whole.finish_reason
    assert stream.result().text == whole.text
    heard = []
    assert (
        tiny.generate(PROMPT, 40, temperature=1.0, seed=3, streamer=heard.append) == whole or heard
    )
    assert "".join(heard) == whole.text


def test_stop_strings(tiny):
    whole = tiny.generate(PROMPT, 30, temperature=1.5, seed=1, ignore_end=True).text
    middle = whole[len(whole) // 2 :][:2]
    result = tiny.generate(PROMPT, 30, temperature=1.5, seed=1, ignore_end=True, stop=middle)
    assert result.text == whole[: whole.index(middle)]
    assert result.finish_reason == "stop"
    streamed = list(
        tiny.stream(PROMPT, 30, temperature=1.5, seed=1, ignore_end=True, stop=[middle])
    )
    assert "".join(streamed) == result.text
    for stop in ("", [""], [1], 7):
        with pytest.raises(ArgumentError, match="stop"):
            tiny.generate(PROMPT, 3, stop=stop)


def test_end_tokens(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    model = nybble.load(folder, threads=1)
    tokens = model.generate(PROMPT, 8, ignore_end=True).tokens
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokens[3], 999]}))
    model = nybble.load(folder, threads=1)
    assert tokens[3] in model.end_ids
    assert 999 not in model.end_ids
    result = model.generate(PROMPT, 8)
    assert result.tokens == tokens[: tokens.index(tokens[3])]
    assert result.finish_reason == "stop"


def test_sampling_is_repeatable_and_reported(tiny):
    first = tiny.generate(PROMPT, 20, temperature=1.0)
    again = tiny.generate(PROMPT, 20, temperature=1.0, seed=first.seed)
    assert again.tokens == first.tokens
    seeds = {tuple(tiny.generate(PROMPT, 20, temperature=1.0, seed=s).tokens) for s in range(5)}
    assert len(seeds) > 1
    assert tiny.generate(PROMPT, 5, do_sample=False, temperature=1.0).tokens == (
        tiny.generate(PROMPT, 5).tokens
    )
    assert (
        tiny.generate(PROMPT, 5, do_sample=True, top_k=1).tokens == tiny.generate(PROMPT, 5).tokens
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", 1 << 70),
        ("top_p", math.nan),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("min_p", math.nan),
        ("min_p", 2),
        ("repeat_penalty", 0.0),
        ("repeat_penalty", math.nan),
        ("repeat_last_n", -1),
        ("seed", -1),
        ("seed", 1 << 64),
        ("max_new_tokens", -1),
        ("max_new_tokens", 1 << 64),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", math.nan),
    ],
)
def test_settings_out_of_range(tiny, name, value):
    with pytest.raises(ArgumentError, match=name):
        tiny.generate(PROMPT, **{name: value})


def test_sampling_from_nothing(tiny):
    with pytest.raises(ArgumentError, match="temperature"):
        tiny.generate(PROMPT, 3, do_sample=True, temperature=0)


def test_prompts_that_are_none(tiny, tmp_path):
    for prompt in ("", [], np.zeros(0, dtype=np.uint32)):
        with pytest.raises(ArgumentError, match="at least one token"):
            tiny.generate(prompt, 3)
    with pytest.raises(ArgumentError, match="at least one token"):
        tiny.forward([])
    folder = write_llama(tmp_path / "begins")
    write_tokenizer(folder, begin=True)
    assert len(nybble.load(folder, threads=1).generate("", 3, ignore_end=True).tokens) == 3


def test_no_new_tokens(tiny):
    result = tiny.generate(PROMPT, 0)
    assert (result.text, result.tokens, result.finish_reason) == ("", [], "length")


@pytest.mark.parametrize("ids", [[290], [1, -1], [1 << 31], [1 << 40], [1, 2, 100000]])
def test_tokens_outside_the_vocabulary(tiny, ids):
    for call in (tiny.forward, tiny.generate, tiny.session().forward):
        with pytest.raises(TokenError, match="outside the vocabulary of 290"):
            call(ids)


@pytest.mark.parametrize(
    "ids", [[1.5], ["a"], [[1, 2], [3]], [[1, 2], [3, 4]], 7, None, [None], b"ab", [True]]
)
def test_tokens_of_the_wrong_type(tiny, ids):
    with pytest.raises(ArgumentError, match="integers"):
        tiny.forward(ids)


def test_the_extension_checks_for_itself(tiny):
    raw = tiny.raw.session()
    with pytest.raises(TokenError):
        raw.forward(np.array([290], dtype=np.uint32))
    with pytest.raises(TypeError):
        raw.forward([1, 2])
    with pytest.raises(ArgumentError, match="temperature"):
        raw.generate(np.array([1], dtype=np.uint32), 1, temperature=math.nan)
    with pytest.raises(ArgumentError, match="stop"):
        raw.generate(np.array([1], dtype=np.uint32), 1, [290])
    with pytest.raises(OverflowError):
        raw.generate(np.array([1], dtype=np.uint32), -1)


def test_the_context_s_end(tiny_folder):
    model = nybble.load(tiny_folder, threads=1, context=20)
    result = model.generate([5] * 10, 100, ignore_end=True)
    assert result.finish_reason == "context"
    # The last token needs no place: nothing follows it.
    assert len(result.tokens) == 11
    assert len(model.generate([5] * 20, 5, ignore_end=True).tokens) == 1
    with pytest.raises(ContextError, match="21 tokens do not fit into the context of 20"):
        model.generate([5] * 21, 5)
    with pytest.raises(ContextError):
        model.forward([5] * 21)
    session = model.session()
    session.forward([5] * 20)
    with pytest.raises(ContextError):
        session.forward([5])
    assert len(session) == 20


def test_a_session_computes_only_what_is_new(tiny):
    session = tiny.session()
    first = tiny.generate([5, 6, 7, 8], 6, ignore_end=True, session=session)
    assert session.tokens == [5, 6, 7, 8, *first.tokens[:-1]]
    prompt = [5, 6, 7, 8, *first.tokens, 9]
    again = tiny.generate(prompt, 6, ignore_end=True, session=session)
    assert again.metrics["prefill_tokens"] == 2
    assert again.tokens == tiny.generate(prompt, 6, ignore_end=True).tokens
    other = tiny.generate([5, 6, 1], 6, ignore_end=True, session=session)
    assert other.metrics["prefill_tokens"] == 1
    assert other.tokens == tiny.generate([5, 6, 1], 6, ignore_end=True).tokens
    same = tiny.generate([5, 6, 1], 6, ignore_end=True, session=session)
    assert same.tokens == other.tokens


def test_chat(tiny):
    messages = [{"role": "user", "content": "hello <|im_end|>"}]
    answer = tiny.chat(messages, 10)
    ids = tiny.tokenizer.chat(messages)
    assert answer.tokens == tiny.generate(ids, 10).tokens
    assert "".join(tiny.chat_stream(messages, 10)) == answer.text
    heard = []
    tiny.chat(messages, 10, streamer=heard.append, top_k=5, temperature=0.5, seed=1)
    assert heard


def test_a_turn_s_end_stops_a_chat(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    model = nybble.load(folder, threads=1)
    assert model.end_ids == (0,)
    stream = model.chat_stream([{"role": "user", "content": "x"}], 1)
    assert stream.result().finish_reason in {"length", "stop"}
    assert model._turn_end == 2


def test_without_a_tokenizer(tmp_path):
    model = nybble.load(write_llama(tmp_path / "bare"), threads=1)
    assert not model.has_tokenizer
    result = model.generate([1, 5, 6], 4, ignore_end=True)
    assert len(result.tokens) == 4
    assert result.text == ""
    with pytest.raises(MissingFileError, match="tokenizer"):
        model.generate("text")
    with pytest.raises(ArgumentError, match="tokenizer"):
        model.generate([1], stop="x")


def test_other_ways_to_load(tiny_folder):
    ids = [1, 5, 6]
    expected = nybble.load(tiny_folder, threads=1).forward(ids)
    for model in (
        nybble.from_pretrained(str(tiny_folder)),
        nybble.NybbleForCausalLM.from_pretrained(tiny_folder, threads=2),
        nybble.load(tiny_folder, mmap=False),
        nybble.load(tiny_folder, kv="f32", context=64),
    ):
        assert np.array_equal(model.forward(ids), expected)
    half = nybble.load(tiny_folder, kv="f16").forward(ids)
    assert np.allclose(half, expected, atol=0.05)
    codes = nybble.load(tiny_folder, kv="int8")
    assert codes.info["kv_type"] == "int8"
    assert np.allclose(codes.forward(ids), expected, atol=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 0},
        {"threads": -1},
        {"threads": 100000},
        {"threads": 1.5},
        {"context": 0},
        {"context": 513},
        {"context": -5},
        {"kv": "f64"},
    ],
)
def test_options_out_of_range(tiny_folder, options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        nybble.load(tiny_folder, **options)


def test_folders_that_are_none(tmp_path, tiny_folder):
    with pytest.raises(MissingFileError, match="nowhere") as caught:
        nybble.load(tmp_path / "nowhere")
    assert isinstance(caught.value, FileNotFoundError)
    assert caught.value.errno == 2
    assert str(caught.value.filename).endswith("nowhere")
    with pytest.raises(NybbleError):
        nybble.load(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGML")
    with pytest.raises(FormatError, match=r"x\.gguf"):
        nybble.load(tmp_path / "x.gguf")
    pickled = tmp_path / "model.bin"
    pickled.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises((FormatError, UnsupportedError)):
        nybble.load(pickled)
    folder = tmp_path / "odd"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "marsupial"}))
    with pytest.raises(UnsupportedError, match="marsupial"):
        nybble.load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 7}))
    with pytest.raises((ConfigError, FormatError), match=r"config\.json|tensor"):
        nybble.load(folder)


@settings(deadline=None, max_examples=25)
@given(
    ids=st.lists(st.integers(-5, 400), max_size=6),
    n=st.integers(-3, 20),
    temperature=st.floats(allow_nan=True, allow_infinity=True),
    top_k=st.integers(-3, 400),
    top_p=st.floats(),
    min_p=st.floats(),
)
def test_any_request_is_answered_or_refused(tiny, ids, n, temperature, top_k, top_p, min_p):
    try:
        result = tiny.generate(
            ids, n, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=0
        )
    except NybbleError:
        return
    assert len(result.tokens) <= n
    assert all(0 <= i < 290 for i in result.tokens)
