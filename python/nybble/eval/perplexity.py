"""Perplexity: how surprised a model is by a text, token by token.

The protocol is the usual one for WikiText-2: the text is encoded once without a begin token and cut
into windows of ``context`` tokens that do not overlap. In each window every token but the first is
predicted from those before it in the window. The perplexity is ``exp`` of the mean loss over all
predicted tokens; the last, shorter window counts with its tokens.

Perplexities compare only between models with the same tokenizer. Bits per byte compare across
tokenizers: the losses in bits, divided by the bytes of the text that was predicted.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import ArgumentError, FormatError
from nybble.eval.losses import Tally, exp, token_losses
from nybble.eval.text import read_text

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nybble.runtime import LanguageModel, Session

#: Tokens computed at once: their logits, this many rows of the vocabulary, are all that is held.
_CHUNK = 128


@dataclass(frozen=True)
class Perplexity:
    """What a text measured.

    Parameters
    ----------
    perplexity, perplexity_stderr
        ``exp`` of the loss, and its standard error over the windows (``None`` for one window).
    loss, loss_stderr
        Mean loss a predicted token, in nats.
    bits_per_token, bits_per_byte
        The same loss in bits, a token and a byte of the predicted text.
    tokens, predicted_tokens, predicted_bytes
        Tokens that were read, tokens that were predicted, and the bytes of those.
    windows, context
        Number and length of the windows.
    seconds, tokens_per_second
        Time for everything but loading and encoding, and tokens read in a second of it.
    """

    perplexity: float
    perplexity_stderr: float | None
    loss: float
    loss_stderr: float | None
    bits_per_token: float
    bits_per_byte: float | None
    tokens: int
    predicted_tokens: int
    predicted_bytes: int
    windows: int
    context: int
    seconds: float
    tokens_per_second: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


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


def perplexity(
    model: "LanguageModel",
    text: "str | Path",
    *,
    context: int = 1024,
    max_tokens: int | None = None,
    on_window: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Measure a model's perplexity on a text.

    Parameters
    ----------
    model
        Any model :func:`nybble.load` gives: float or compressed, folder or GGUF.
    text
        The text itself, or a ``Path`` of a file that :func:`nybble.eval.read_text` reads.
    context
        Tokens a window, at most the model's context.
    max_tokens
        Use only that many tokens of the text.
    on_window
        Called after each window with the tokens read, the tokens in all, and the perplexity so far.

    Raises
    ------
    ArgumentError
        If ``context`` does not fit the model, or the text has fewer than two tokens.
    FormatError
        If the model's logits are not finite.
    """
    limit = model.context
    if not 2 <= context <= limit:
        msg = f"context: expected 2 to {limit} (the model's own limit), found {context}"
        raise ArgumentError(msg)
    if max_tokens is not None and max_tokens < 2:
        msg = f"max_tokens: expected at least 2, found {max_tokens}"
        raise ArgumentError(msg)
    tokens = encode(model, read_text(text) if isinstance(text, Path) else text, max_tokens)
    if len(tokens) < 2:
        msg = f"text: expected at least 2 tokens, found {len(tokens)}"
        raise ArgumentError(msg)
    windows = [tokens[start : start + context] for start in range(0, len(tokens), context)]
    if len(windows[-1]) < 2:
        windows.pop()  # one token alone predicts nothing
    tally, read, size = Tally(), 0, 0
    session = model.session()
    start = time.perf_counter()
    for window in windows:
        for losses in _window_losses(session, window):
            tally.add(losses)
        tally.close()
        if not math.isfinite(tally.losses[-1]):
            msg = f"window {len(tally.losses)}: the model's logits are not finite"
            raise FormatError(msg)
        read += len(window)
        size += _bytes_after_first(model, window)
        if on_window is not None:
            on_window(read, len(tokens), exp(tally.mean))
    seconds = time.perf_counter() - start
    loss, error = tally.mean, tally.standard_error
    return Perplexity(
        perplexity=exp(loss),
        perplexity_stderr=None if error is None else exp(loss) * error,
        loss=loss,
        loss_stderr=error,
        bits_per_token=loss / math.log(2),
        bits_per_byte=loss * tally.tokens / math.log(2) / size if size else None,
        tokens=read,
        predicted_tokens=tally.tokens,
        predicted_bytes=size,
        windows=len(windows),
        context=context,
        seconds=seconds,
        tokens_per_second=read / seconds if seconds > 0 else math.inf,
    )


def _window_losses(session: "Session", window: list[int]) -> "Iterator[npt.NDArray[np.float64]]":
    """Give the losses of a window's tokens but the first, a chunk at a time."""
    session.truncate(0)
    inputs = window[:-1]
    for start in range(0, len(inputs), _CHUNK):
        piece = inputs[start : start + _CHUNK]
        logits = session.forward(piece, "all")
        yield token_losses(logits, window[start + 1 : start + 1 + len(piece)])


def _bytes_after_first(model: "LanguageModel", window: list[int]) -> int:
    """Return how many bytes of text the tokens behind the first stand for.

    As a difference, so that what a decoder does to the beginning of a text cancels out.
    """
    decode = model.tokenizer.decode
    whole = decode(window, skip_special_tokens=False)
    first = decode(window[:1], skip_special_tokens=False)
    return len(whole.encode()) - len(first.encode())
