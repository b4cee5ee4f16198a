"""Tokenizers rebuilt from GGUF metadata, compared with the ones the metadata came from."""

import io
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, pre_tokenizers

from nybble.errors import FormatError, UnsupportedError
from nybble.runtime.gguf_tokenizer import _PRE_TOKENIZERS
from nybble.runtime.tokenizer import from_folder, from_gguf
from tiny import CHAT_TEMPLATE, SPECIAL, byte_level_tokenizer

TEXTS = [
    "",
    " ",
    "  a",
    "\n\n\n x\r\n",
    "the cat sat on the mat",
    "日本語のテキスト، और हिन्दी",
    "🤦🏼‍♂️ héllo e\u0301",
    "a\u00a0b\u2003c",
    "def f(x):\n\treturn x**2 # 3.14159 ²³Ⅷ",
    "١٢٣ 12345 1,000.00",
    "\u0000\x7f\ufeff",
    "don't I'LL we'Ve it's",
    "end<|im_end|>",
    "https://a.b/c?d=e&f#g ...!!! (x|y)",
]


def byte_level_metadata(pre, **more):
    content = json.loads(byte_level_tokenizer().to_str())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
        **more,
    }


def split_by(*expressions, digits=False):
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [pre_tokenizers.Split(Regex(text), "isolated") for text in expressions]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not expressions)
    return pre_tokenizers.Sequence([*steps, level])


# The rules as the models' own files have them.
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
REFERENCES = {
    "gpt-2": split_by(),
    "smollm": split_by(digits=True),
    "llama-bpe": split_by(QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")),
    "qwen2": split_by(QWEN),
    "bloom": split_by(r" ?[^(\s|[.,!?…。，、।۔،])]+"),  # noqa: RUF001
}


@pytest.mark.parametrize("pre", REFERENCES)
def test_words_are_cut_as_the_model_s_own_file_does(pre):
    rebuilt = from_gguf(byte_level_metadata(pre, **{"tokenizer.ggml.add_bos_token": False}))
    reference = byte_level_tokenizer()
    reference.pre_tokenizer = REFERENCES[pre]
    reference.encode_special_tokens = True
    if pre == "qwen2":
        reference.normalizer = tokenizers.normalizers.NFC()
    for text in TEXTS:
        assert rebuilt.encode(text) == reference.encode(text).ids
        if pre != "qwen2":
            assert rebuilt.decode(rebuilt.encode(text)) == text


@pytest.mark.parametrize("pre", _PRE_TOKENIZERS)
def test_every_rule_keeps_the_text(pre):
    rebuilt = from_gguf(byte_level_metadata(pre, **{"tokenizer.ggml.add_bos_token": False}))
    for text in TEXTS:
        if "e\u0301" not in text:
            assert rebuilt.decode(rebuilt.encode(text)) == text


def test_special_tokens_and_the_template(tmp_path):
    rebuilt = from_gguf(byte_level_metadata("smollm"), "model.gguf")
    assert rebuilt.special_ids == {0, 1, 2}
    assert rebuilt.end_ids == (2,)
    assert rebuilt.special_tokens == {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    assert not rebuilt.begins
    chat = rebuilt.chat([{"role": "user", "content": "hi <|im_end|>"}])
    assert [i for i in chat if i in rebuilt.special_ids] == [1, 2, 1]
    rebuilt.save(tmp_path)
    again = from_folder(tmp_path)
    assert again.chat([{"role": "user", "content": "hi"}]) == rebuilt.chat(
        [{"role": "user", "content": "hi"}]
    )
    for text in TEXTS:
        assert again.encode(text) == rebuilt.encode(text)


def test_begin_and_end_tokens():
    assert from_gguf(byte_level_metadata("llama-bpe")).encode("") == [0]
    metadata = byte_level_metadata("gpt-2")
    metadata |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert from_gguf(metadata).encode("") == [0, 2]
    metadata |= {"tokenizer.ggml.eot_token_id": 1}
    assert from_gguf(metadata).end_ids == (1, 2)


def test_user_defined_tokens_are_found_but_not_special():
    metadata = byte_level_metadata("gpt-2")
    metadata["tokenizer.ggml.tokens"].append("<think>")
    metadata["tokenizer.ggml.token_type"].append(4)
    rebuilt = from_gguf(metadata)
    index = rebuilt.token_id("<think>")
    assert index in rebuilt.encode("a<think>b")
    assert index not in rebuilt.special_ids
    assert rebuilt.decode(rebuilt.encode("a<think>b")) == "a<think>b"


@pytest.fixture(scope="module")
def sentencepiece_model():
    sentencepiece = pytest.importorskip("sentencepiece")
    sentences = [
        "the cat sat on the mat and the dog ran",
        "a small model runs fast on the CPU",
        "hello world, how are you today?",
        "grüße aus köln",
    ] * 50
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=out,
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def sentencepiece_metadata(model, **more):
    size = model.vocab_size()

    def kind(i):
        return next(
            kind
            for kind, test in (
                (2, model.is_unknown),
                (3, model.is_control),
                (6, model.is_byte),
                (1, lambda _: True),
            )
            if test(i)
        )

    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(size)],
        "tokenizer.ggml.token_type": [kind(i) for i in range(size)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **more,
    }


def test_sentencepiece_vocabularies(sentencepiece_model):
    rebuilt = from_gguf(sentencepiece_metadata(sentencepiece_model))
    for text in [*TEXTS, "the cat", "  two  spaces ", "köln", "the the the"]:
        expected = sentencepiece_model.encode(text) if text else []
        ids = rebuilt.encode(text)
        assert ids[0] == 1
        if "\u0000" in text:
            continue  # sentencepiece's own normalizer drops it
        assert ids[1:] == expected, text
        assert rebuilt.decode(ids) == text


@settings(deadline=None)
@given(st.text("abcdeht the möß€\n", min_size=1, max_size=30))
def test_sentencepiece_on_any_text(sentencepiece_model, text):
    rebuilt = _cached(sentencepiece_model)
    assert rebuilt.encode(text)[1:] == sentencepiece_model.encode(text)


_CACHE = {}


def _cached(model):
    if not _CACHE:
        _CACHE[0] = from_gguf(sentencepiece_metadata(model))
    return _CACHE[0]


def test_sentencepiece_streams_as_it_decodes(sentencepiece_model):
    rebuilt = from_gguf(sentencepiece_metadata(sentencepiece_model))
    text = "the cat € 日本 ran"
    decoder = rebuilt.stream()
    ids = rebuilt.encode(text)
    assert "".join(decoder.push(i) for i in ids) + decoder.finish() == text
    decoder = rebuilt.stream(context=rebuilt.encode("the cat"))
    assert decoder.push(rebuilt.encode("the", add_special_tokens=False)[0]) == " the"


def test_gemma_s_vocabulary(sentencepiece_model):
    metadata = sentencepiece_metadata(sentencepiece_model)
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["general.architecture"] = "gemma3"
    metadata["tokenizer.ggml.scores"] = [-1000.0] * size  # they tell nothing
    metadata["tokenizer.ggml.add_space_prefix"] = False
    metadata["tokenizer.ggml.tokens"] += ["\n\n", "  "]
    metadata["tokenizer.ggml.token_type"] += [4, 4]
    metadata["tokenizer.ggml.scores"] += [0.0, 0.0]
    rebuilt = from_gguf(metadata)
    ids = rebuilt.encode("cat\n\n\nthe  cat")
    assert size in ids
    assert size + 1 in ids
    assert rebuilt.decode(ids) == "cat\n\n\nthe  cat"
    # Without the prefix a text's first word is another one.
    assert rebuilt.encode(" the cat")[1:] == sentencepiece_model.encode("the cat")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.ggml.tokens", None),
        ("tokenizer.ggml.tokens", "abc"),
        ("tokenizer.ggml.tokens", ["a", "a"]),
        ("tokenizer.ggml.tokens", [1, 2]),
        ("tokenizer.ggml.token_type", [1]),
        ("tokenizer.ggml.token_type", ["x"] * 290),
        ("tokenizer.ggml.merges", ["nospace"]),
        ("tokenizer.ggml.merges", ["q not_in_vocabulary"]),
        ("tokenizer.ggml.merges", None),
        ("tokenizer.ggml.bos_token_id", 290),
        ("tokenizer.ggml.eos_token_id", -1),
        ("tokenizer.ggml.eos_token_id", "2"),
        ("tokenizer.ggml.eot_token_id", 1 << 31),
        ("tokenizer.ggml.add_bos_token", "yes"),
        ("tokenizer.ggml.pre", 7),
        ("tokenizer.chat_template", 7),
    ],
)
def test_metadata_that_lie(key, value):
    metadata = byte_level_metadata("gpt-2")
    if value is None:
        del metadata[key]
    else:
        metadata[key] = value
    with pytest.raises(FormatError, match=r"bad\.gguf") as caught:
        from_gguf(metadata, "bad.gguf")
    assert key in str(caught.value) or "loading" in str(caught.value)


@pytest.mark.parametrize(("key", "name"), [("model", "rwkv"), ("pre", "chatglm-bpe")])
def test_unknown_kinds_are_named(key, name):
    metadata = byte_level_metadata("gpt-2", **{f"tokenizer.ggml.{key}": name})
    with pytest.raises(UnsupportedError, match=name):
        from_gguf(metadata)


def test_the_library_reads_what_was_rebuilt(sentencepiece_model, tmp_path):
    rebuilt = from_gguf(sentencepiece_metadata(sentencepiece_model))
    rebuilt.save(tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert isinstance(plain.decoder, decoders.Sequence)
    assert plain.encode("the cat").ids == rebuilt.encode("the cat")
