"""A text as windows of tokens, and what a model predicts in a window."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nybble.errors import ArgumentError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nybble.runtime import LanguageModel, Session

#: Tokens computed at once: their logits, this many rows of the vocabulary, are all that is held.
CHUNK = 128


def encode(model: "LanguageModel", text: str, max_tokens: int | None = None) -> list[int]:
    """Return the first tokens of a text, without a begin token.

    Only as much of the text as ``max_tokens`` needs is encoded.
    """
    size = len(text) if max_tokens is None else 8 * max_tokens + 4096
    while True:
        tokens = model.tokenizer.encode(text[:size], add_special_tokens=False)
        # The last tokens of a cut text differ from those of the whole: there must be some to spare.
        if size >= len(text) or (max_tokens is not None and len(tokens) >= max_tokens + 256):
            return tokens[:max_tokens]
        size *= 2


def cut(tokens: list[int], *, context: int, limit: int, prompt_tokens: int = 1) -> list[list[int]]:
    """Cut tokens into windows that do not overlap.

    The last window, which is shorter, counts if something is left to predict in it.

    Parameters
    ----------
    tokens
        The tokens of the text.
    context
        Tokens a window.
    limit
        Most tokens the model takes.
    prompt_tokens
        Tokens at the beginning of each window that are given, not predicted.

    Raises
    ------
    ArgumentError
        If a length is out of its range, or no window has a token to predict.
    """
    if not 2 <= context <= limit:
        msg = f"context: expected 2 to {limit} (the model's own limit), found {context}"
        raise ArgumentError(msg)
    if not 1 <= prompt_tokens < context:
        msg = f"prompt_tokens: expected 1 to {context - 1} (context - 1), found {prompt_tokens}"
        raise ArgumentError(msg)
    if len(tokens) <= prompt_tokens:
        msg = f"text: expected at least {prompt_tokens + 1} tokens, found {len(tokens)}"
        raise ArgumentError(msg)
    windows = [tokens[start : start + context] for start in range(0, len(tokens), context)]
    if len(windows[-1]) <= prompt_tokens:
        windows.pop()
    return windows


def predictions(
    session: "Session", window: list[int], prompt_tokens: int = 1
) -> "Iterator[tuple[npt.NDArray[np.float32], list[int]]]":
    """Give logits and the tokens they predict, for a window's tokens behind the prompt.

    The logits come a chunk at a time, arrays of shape ``[at most CHUNK, vocab]``. A prompt of
    several tokens is computed in one go, as a generation would do it; what a session does to its
    prompts alone therefore acts on the prompt and on nothing behind it.
    """
    session.truncate(0)
    at = 0
    if prompt_tokens > 1:
        logits = session.forward(window[:prompt_tokens], "last", prompt=True)
        yield logits, window[prompt_tokens:][:1]
        at = prompt_tokens
    for start in range(at, len(window) - 1, CHUNK):
        inputs = window[start : min(start + CHUNK, len(window) - 1)]
        yield session.forward(inputs, "all"), window[start + 1 : start + 1 + len(inputs)]


def bytes_behind(model: "LanguageModel", window: list[int], prompt_tokens: int = 1) -> int:
    """Return how many bytes of text the tokens behind the prompt stand for.

    As a difference, so that what a decoder does to the beginning of a text cancels out.
    """
    decode = model.tokenizer.decode
    whole = decode(window, skip_special_tokens=False)
    first = decode(window[:prompt_tokens], skip_special_tokens=False)
    return len(whole.encode()) - len(first.encode())
