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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import ArgumentError, FormatError
from nybble.eval.losses import Tally, exp, token_losses
from nybble.eval.text import read_text
from nybble.eval.windows import bytes_behind, cut, encode, predictions

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nybble.runtime import LanguageModel, Session


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
    prompt_tokens
        Tokens at the beginning of each window that are given and not predicted.
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
    prompt_tokens: int
    seconds: float
    tokens_per_second: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


class Meter:
    """Adds up the losses of one model, window by window.

    Parameters
    ----------
    model
        Whose losses they are.
    prompt_tokens
        Tokens at the beginning of each window that are not predicted.
    """

    def __init__(self, model: "LanguageModel", prompt_tokens: int) -> None:
        self.tally = Tally()
        self.read = 0
        self.seconds = 0.0
        self._model = model
        self._prompt = prompt_tokens
        self._bytes = 0

    def add(self, losses: "npt.NDArray[np.float64]") -> None:
        """Count some tokens of the present window."""
        self.tally.add(losses)

    def close(self, window: list[int]) -> None:
        """End the present window.

        Raises
        ------
        FormatError
            If its losses are not finite.
        """
        self.tally.close()
        if not math.isfinite(self.tally.losses[-1]):
            number = len(self.tally.losses)
            msg = f"{self._model.path}: window {number}: the model's logits are not finite"
            raise FormatError(msg)
        self.read += len(window)
        self._bytes += bytes_behind(self._model, window, self._prompt)

    def result(self, context: int) -> Perplexity:
        """Return what the windows measured."""
        tally, size = self.tally, self._bytes
        loss, error = tally.mean, tally.standard_error
        return Perplexity(
            perplexity=exp(loss),
            perplexity_stderr=None if error is None else exp(loss) * error,
            loss=loss,
            loss_stderr=error,
            bits_per_token=loss / math.log(2),
            bits_per_byte=loss * tally.tokens / math.log(2) / size if size else None,
            tokens=self.read,
            predicted_tokens=tally.tokens,
            predicted_bytes=size,
            windows=len(tally.losses),
            context=context,
            prompt_tokens=self._prompt,
            seconds=self.seconds,
            tokens_per_second=self.read / self.seconds if self.seconds > 0 else math.inf,
        )


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
    return measure(
        model, text, prompt_tokens=1, context=context, max_tokens=max_tokens, on_window=on_window
    )


def measure(
    model: "LanguageModel",
    text: "str | Path",
    *,
    prompt_tokens: int,
    context: int,
    max_tokens: int | None,
    on_window: Callable[[int, int, float], None] | None,
    session: "Session | None" = None,
) -> Perplexity:
    """Measure the loss of what stands behind the first ``prompt_tokens`` tokens of each window.

    See :func:`perplexity` and :func:`nybble.eval.continuation` for the parameters.
    """
    tokens = text_tokens(model, text, max_tokens)
    windows = cut(tokens, context=context, limit=model.context, prompt_tokens=prompt_tokens)
    meter = Meter(model, prompt_tokens)
    session = model.session() if session is None else session
    start = time.perf_counter()
    for window in windows:
        for logits, targets in predictions(session, window, prompt_tokens):
            meter.add(token_losses(logits, targets))
        meter.close(window)
        if on_window is not None:
            on_window(meter.read, len(tokens), exp(meter.tally.mean))
    meter.seconds = time.perf_counter() - start
    return meter.result(context)


def text_tokens(
    model: "LanguageModel", text: "str | Path", max_tokens: int | None = None
) -> list[int]:
    """Return the first tokens of a text or of a text file.

    Raises
    ------
    ArgumentError
        If ``max_tokens`` is less than two.
    """
    if max_tokens is not None and max_tokens < 2:
        msg = f"max_tokens: expected at least 2, found {max_tokens}"
        raise ArgumentError(msg)
    return encode(model, read_text(text) if isinstance(text, Path) else text, max_tokens)
