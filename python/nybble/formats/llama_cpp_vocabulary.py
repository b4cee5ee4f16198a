"""A byte-level tokenizer as the metadata of a GGUF file has it."""

from __future__ import annotations

import json
from typing import Any

from nybble.errors import UnsupportedError
from nybble.runtime.gguf_tokenizer import pre_name
from nybble.runtime.tokenizer import Tokenizer

__all__ = ["add_vocabulary"]

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def add_vocabulary(writer: Any, tokenizer: Tokenizer, size: int) -> None:
    """Add a tokenizer to a file.

    Parameters
    ----------
    writer
        A ``gguf.GGUFWriter``.
    tokenizer
        The tokenizer.
    size
        Rows of the embedding; those without a token get names of their own.

    Raises
    ------
    UnsupportedError
        When it is not a byte-level BPE, or cuts text into words by a rule that has no name.
    """
    content: dict[str, Any] = json.loads(tokenizer.text)
    model = content.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        message = f"{tokenizer.where}: a tokenizer of this kind is not written to GGUF files: "
        message += f"expected a byte-level BPE, found {model.get('type')!r:.40}"
        raise UnsupportedError(message)
    name = pre_name(content)
    if name is None:
        message = f"{tokenizer.where}: its rule for words has no name that llama.cpp knows"
        raise UnsupportedError(message)
    tokens = [f"[unused{index}]" for index in range(size)]
    kinds = [_UNUSED] * size
    added = {entry["content"]: entry for entry in content.get("added_tokens", ())}
    known = {**model["vocab"], **{text: entry["id"] for text, entry in added.items()}}
    for text, index in known.items():
        if index < size:
            tokens[index], kinds[index] = text, _NORMAL
            if text in added:
                kinds[index] = _CONTROL if added[text].get("special") else _USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_token_merges(merges)
    for role, text in tokenizer.special_tokens.items():
        index, put = known.get(text), getattr(writer, f"add_{role}_id", None)
        if index is not None and put is not None:
            put(index)
    writer.add_add_bos_token(tokenizer.begins)
    if (template := tokenizer.templates.get("default")) is not None:
        writer.add_chat_template(template)
