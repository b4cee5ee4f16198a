"""Rebuilds a tokenizer from the metadata of a GGUF file.

A GGUF file holds a vocabulary, the kind of every token, merges or scores, and the *name* of the
rule that cuts text into words (``tokenizer.ggml.pre``); not the rule. The rules known here are
written down in `_PRE_TOKENIZERS`, as the models' own ``tokenizer.json`` have them. Two kinds of
vocabulary are read:

* ``gpt2``: byte-level BPE, with merges (Llama 3, SmolLM2, Qwen, GPT-2, BLOOM, OPT);
* ``llama``: a SentencePiece BPE with byte fallback, with scores (Llama 2, Mistral, Gemma). Merges
  follow from the scores: a pair of pieces is merged when it makes a piece, best score first.

The result is the content of a ``tokenizer.json`` and a ``tokenizer_config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nybble.errors import FormatError, UnsupportedError

__all__ = ["byte_level_json", "pre_name", "rebuild"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Pre:
    """How text is cut into words before merging."""

    splits: tuple[str, ...] = ()
    """Expressions applied one after the other; none means GPT-2's."""
    digits: bool = False
    """Whether every digit stands alone, before the splits."""
    nfc: bool = False
    """Whether text is composed first."""
    whole_words: bool = False
    """Whether a word that is a token is that token, whatever the merges say."""
    begin: bool = False
    """Whether the begin token comes first when the file does not say."""


_GPT2_PRE = _Pre()
_SMOLLM_PRE = _Pre(digits=True)
_LLAMA3_PRE = _Pre((_LLAMA3,), whole_words=True, begin=True)
_QWEN2_PRE = _Pre((_QWEN2,), nfc=True)
_BLOOM_PRE = _Pre((r" ?[^(\s|.,!?…。，、।۔،)]+",))  # noqa: RUF001
_DEFAULT_PRE = _Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))

_PRE_TOKENIZERS = {
    "default": _DEFAULT_PRE,
    "gpt-2": _GPT2_PRE,
    "gpt2": _GPT2_PRE,
    "phi-2": _GPT2_PRE,
    "mpt": _GPT2_PRE,
    "olmo": _GPT2_PRE,
    "smollm": _SMOLLM_PRE,
    "starcoder": _SMOLLM_PRE,
    "refact": _SMOLLM_PRE,
    "command-r": _SMOLLM_PRE,
    "llama3": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    "llama-bpe": _LLAMA3_PRE,
    "falcon3": _LLAMA3_PRE,
    "qwen2": _QWEN2_PRE,
    "stablelm2": _Pre((_QWEN2,)),
    "deepseek-r1-qwen": _Pre((_QWEN2,)),
    "tekken": _Pre((_TEKKEN,), whole_words=True, begin=True),
    "bloom": _BLOOM_PRE,
    "gpt3-finnish": _BLOOM_PRE,
}

_ROLES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_END_IDS = (
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
)


@dataclass(frozen=True)
class Rebuilt:
    """A tokenizer as the files of a Hugging Face folder hold it."""

    tokenizer: dict[str, Any]
    config: dict[str, Any]
    templates: dict[str, str] = field(default_factory=dict)
    end_ids: tuple[int, ...] = ()


class _Metadata:
    """Typed access that names the file and the key in every error."""

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self.values = values
        self.where = where

    def wrong(self, key: str, expected: str, found: object) -> FormatError:
        text = repr(found) if isinstance(found, str | int | float | None) else type(found).__name__
        message = f"{self.where}: {key}: expected {expected}, found {text[:100]}"
        return FormatError(message)

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self.values.get(key, default)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "a text", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false", value)
        return value

    def texts(self, key: str) -> list[str]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of texts", value)
        return value

    def numbers(self, key: str, length: int) -> list[float] | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, int | float) for item in value):
            raise self.wrong(key, "a list of numbers", value)
        if len(value) != length:
            raise self.wrong(key, f"{length} numbers, one a token", len(value))
        return value

    def token_id(self, key: str, vocabulary: int) -> int | None:
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocabulary:
            raise self.wrong(key, f"a token id below {vocabulary}", value)
        return value


def rebuild(values: Mapping[str, object], where: str) -> Rebuilt:
    """Rebuild the tokenizer of a GGUF file.

    Parameters
    ----------
    values
        The file's metadata; arrays as lists.
    where
        The file's path, for messages.

    Raises
    ------
    FormatError
        When the metadata contradict each other or are of the wrong type.
    UnsupportedError
        When the kind of vocabulary or the pre-tokenizer is not known.
    """
    metadata = _Metadata(values, where)
    model = metadata.text("tokenizer.ggml.model")
    tokens = metadata.texts("tokenizer.ggml.tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        error = metadata.wrong("tokenizer.ggml.tokens", "every token once", twice)
        raise error
    kinds = metadata.numbers("tokenizer.ggml.token_type", len(tokens))
    ids = {name: metadata.token_id(key, len(tokens)) for name, key in _ROLES.items()}
    if kinds is None:
        kinds = [
            float(_CONTROL if index in ids.values() else _NORMAL) for index in range(len(tokens))
        ]
    if model == "gpt2":
        name = metadata.text("tokenizer.ggml.pre", "default") or "default"
        pre = _PRE_TOKENIZERS.get(name)
        if pre is None:
            known = ", ".join(sorted(_PRE_TOKENIZERS))
            message = f"{where}: tokenizer.ggml.pre {name!r} is not supported; known are {known}"
            raise UnsupportedError(message)
        merges = [_pair(metadata, merge) for merge in metadata.texts("tokenizer.ggml.merges")]
        tokenizer = byte_level_json(vocabulary, merges, pre)
        begin = pre.begin
    elif model == "llama":
        tokenizer = _sentencepiece_json(metadata, vocabulary, kinds, ids["unk_token"])
        begin = True
    else:
        message = f"{where}: tokenizer.ggml.model {model!r} is not supported; known are gpt2, llama"
        raise UnsupportedError(message)
    tokenizer["added_tokens"] = [
        _added(index, token, special=kind in {_CONTROL, _UNKNOWN})
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if token and (kind in {_CONTROL, _USER_DEFINED} or (kind == _UNKNOWN and model == "llama"))
    ]
    before = ids["bos_token"] if metadata.flag("tokenizer.ggml.add_bos_token", begin) else None
    after = ids["eos_token"] if metadata.flag("tokenizer.ggml.add_eos_token", False) else None
    tokenizer["post_processor"] = template_processor(tokens, before, after)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: tokens[index] for name, index in ids.items() if index is not None},
    }
    ends = {metadata.token_id(key, len(tokens)) for key in _END_IDS} - {None}
    return Rebuilt(
        tokenizer=tokenizer,
        config=config,
        templates=_templates(metadata),
        end_ids=tuple(sorted(index for index in ends if index is not None)),
    )


def _templates(metadata: _Metadata) -> dict[str, str]:
    found = {"default": metadata.text("tokenizer.chat_template")}
    for key in metadata.values:
        if key.startswith("tokenizer.chat_template."):
            found[key.removeprefix("tokenizer.chat_template.")] = metadata.text(key)
    return {name: text for name, text in found.items() if text}


def _pair(metadata: _Metadata, merge: str) -> list[str]:
    # The first character belongs to the left part, even if it is a space.
    at = merge.find(" ", 1)
    if at < 0:
        error = metadata.wrong("tokenizer.ggml.merges", "two parts with a space between", merge)
        raise error
    return [merge[:at], merge[at + 1 :]]


def _added(index: int, content: str, *, special: bool) -> dict[str, Any]:
    return {
        "id": index,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def template_processor(
    tokens: Sequence[str], before: int | None, after: int | None
) -> dict[str, Any] | None:
    """Return the post-processor that puts a token before and after every text."""
    if before is None and after is None:
        return None
    used = [index for index in (before, after) if index is not None]

    def sequence(which: str, kind: int) -> list[dict[str, Any]]:
        pieces = [before, None, after]
        out = []
        for place, index in enumerate(pieces):
            if place == 1:
                out.append({"Sequence": {"id": which, "type_id": kind}})
            elif index is not None:
                out.append({"SpecialToken": {"id": tokens[index], "type_id": kind}})
        return out

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {
            tokens[index]: {"id": tokens[index], "ids": [index], "tokens": [tokens[index]]}
            for index in used
        },
    }


def byte_level_json(
    vocabulary: Mapping[str, int], merges: list[list[str]], pre: _Pre = _GPT2_PRE
) -> dict[str, Any]:
    """Return a byte-level BPE tokenizer as ``tokenizer.json`` holds it."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": not pre.splits,
    }
    steps: list[dict[str, Any]] = [
        {
            "type": "Split",
            "pattern": {"Regex": split},
            "behavior": "Isolated",
            "invert": False,
        }
        for split in pre.splits
    ]
    if pre.digits:
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    steps.append(byte_level)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.whole_words,
            "vocab": dict(vocabulary),
            "merges": merges,
        },
    }


def pre_name(tokenizer: Mapping[str, Any]) -> str | None:
    """Return the name of the rule by which a byte-level tokenizer cuts text into words.

    Parameters
    ----------
    tokenizer
        The content of a ``tokenizer.json``.

    Returns
    -------
    str or None
        A value of ``tokenizer.ggml.pre``; ``None`` when its rule is none of the known ones.
    """
    wanted = _rule(tokenizer)
    for name, pre in _PRE_TOKENIZERS.items():
        if _rule(byte_level_json({}, [], pre)) == wanted:
            return name
    return None


def _rule(tokenizer: Mapping[str, Any]) -> tuple[object, ...]:
    """Return what of a tokenizer decides about words, in one spelling."""
    model, normalizer = tokenizer.get("model") or {}, tokenizer.get("normalizer")
    steps = []
    for step in _flat(tokenizer.get("pre_tokenizer")):
        # Where offsets are trimmed changes no token; a step's other settings do.
        settings = {key: value for key, value in step.items() if key != "trim_offsets"}
        if step.get("type") == "ByteLevel":
            settings.setdefault("use_regex", True)
        steps.append(settings)
    parts = [{"type": part.get("type")} for part in _flat(normalizer, "normalizers")]
    return steps, parts, bool(model.get("ignore_merges"))


def _flat(step: Any, inside: str = "pretokenizers") -> list[dict[str, Any]]:
    if not step:
        return []
    if step.get("type") == "Sequence":
        return [one for part in step.get(inside, ()) for one in _flat(part, inside)]
    return [step]


def _sentencepiece_json(
    metadata: _Metadata,
    vocabulary: Mapping[str, int],
    kinds: Sequence[float],
    unknown: int | None,
) -> dict[str, Any]:
    tokens = list(vocabulary)
    scores = metadata.numbers("tokenizer.ggml.scores", len(tokens))
    gemma = (metadata.text("general.architecture") or "").startswith("gemma")
    if "tokenizer.ggml.merges" in metadata.values:
        merges = [_pair(metadata, merge) for merge in metadata.texts("tokenizer.ggml.merges")]
    else:
        # Gemma's scores do not tell the order its pieces were learned in; their places do.
        merges = _merges(vocabulary, kinds, None if gemma else scores)
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", not gemma)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    normalizer = [{"type": "Prepend", "prepend": "\u2581"}, replace] if prefix else [replace]
    decoder: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoder.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": normalizer},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokens[unknown if unknown is not None else 0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": _BYTE in kinds,
            "ignore_merges": False,
            "vocab": dict(vocabulary),
            "merges": merges,
        },
    }


def _merges(
    vocabulary: Mapping[str, int], kinds: Sequence[float], scores: Sequence[float] | None
) -> list[list[str]]:
    """Return every pair of pieces that makes a piece, the best first."""
    pieces = {
        token: index for token, index in vocabulary.items() if kinds[index] in {_NORMAL, _UNUSED}
    }
    # Single characters are pieces too, and the parts of user-defined tokens are never merged.
    found = []
    for token, index in pieces.items():
        score = -scores[index] if scores is not None else 0.0
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in pieces and right in pieces:
                found.append((score, index, pieces[left], pieces[right], left, right))
    found.sort(key=lambda merge: merge[:4])
    return [[left, right] for *_, left, right in found]
