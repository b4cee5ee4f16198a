"""Settings, streams and results of generation."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nybble.errors import ArgumentError
from nybble.runtime.text import StopScanner, TextDecoder

if TYPE_CHECKING:
    from nybble import _nybble

__all__ = ["Generation", "Sampling", "Stream"]

_MAX_SEED = (1 << 64) - 1
_MAX_COUNT = (1 << 31) - 1


def _number(name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        message = f"{name}: expected a number, found {type(value).__name__}"
        raise ArgumentError(message)
    if math.isnan(value) or not low <= value <= high:
        message = f"{name}: expected a number from {low:g} to {high:g}, found {value}"
        raise ArgumentError(message)
    return float(value)


def count(name: str, value: object, high: int = _MAX_COUNT) -> int:
    """Return `value` as an integer from 0 to `high`, or raise :class:`ArgumentError`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        message = f"{name}: expected an integer, found {type(value).__name__}"
        raise ArgumentError(message)
    number = int(value.__index__())
    if not 0 <= number <= high:
        message = f"{name}: expected an integer from 0 to {high}, found {number}"
        raise ArgumentError(message)
    return number


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits.

    Parameters
    ----------
    temperature
        Divides the logits; 0 takes the most probable token always (greedy).
    top_k
        Keeps that many tokens; 0 keeps all.
    top_p
        Keeps the most probable tokens that together reach this probability; 1 keeps all.
    min_p
        Keeps tokens at least this fraction as probable as the most probable one; 0 keeps all.
    repeat_penalty
        Makes tokens of the last `repeat_last_n` less probable; 1 changes nothing.
    repeat_last_n
        How many tokens back a repetition counts.
    seed
        Start of the random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every setting."""
        _number("temperature", self.temperature, 0, 100)
        _number("top_p", self.top_p, 0, 1)
        _number("min_p", self.min_p, 0, 1)
        _number("repeat_penalty", self.repeat_penalty, 0.01, 100)
        count("top_k", self.top_k)
        count("repeat_last_n", self.repeat_last_n)
        count("seed", self.seed, _MAX_SEED)

    @classmethod
    def choose(
        cls,
        *,
        do_sample: bool | None,
        temperature: float | None,
        seed: int | None,
        **settings: Any,
    ) -> Sampling:
        """Return the settings that transformers' arguments mean.

        Without a temperature nothing is drawn, unless `do_sample` asks for it: then it is 1. With
        ``do_sample=False`` the temperature does not matter. Without a seed, a drawn one is used; it
        stands in the result.
        """
        if do_sample is None:
            chosen = 0.0 if temperature is None else temperature
        elif not do_sample:
            chosen = 0.0
        else:
            chosen = 1.0 if temperature is None else temperature
            if chosen == 0:
                message = "temperature: expected more than 0 with do_sample=True, found 0"
                raise ArgumentError(message)
        number = secrets.randbits(32) if seed is None else seed
        return cls(temperature=chosen, seed=number, **settings)


@dataclass(frozen=True)
class Generation:
    """What a model wrote.

    Parameters
    ----------
    text
        The text, without stop strings.
    tokens
        The tokens generated, without the one by which the model ended the text. A stop string's are
        among them.
    finish_reason
        ``"stop"`` (the model ended the text, or a stop string appeared), ``"length"`` (it has as
        many tokens as asked for) or ``"context"`` (the context is full).
    prompt_tokens
        How many tokens the prompt had.
    seed
        The seed that repeats this result.
    metrics
        Tokens and seconds of each phase.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int
    seed: int
    metrics: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


class Stream(Iterator[str]):
    """Text while it is generated: iterate for the pieces, then ask for :meth:`result`.

    Parameters
    ----------
    tokens
        The generator of tokens.
    decoder
        Turns them into text, or ``None`` where there is no tokenizer.
    stops
        Strings that end the text.
    prompt_tokens
        How many tokens the prompt had.
    seed
        The seed in use.
    on_end
        Called when it has ended.
    """

    def __init__(
        self,
        tokens: _nybble.Generator,
        decoder: TextDecoder | None,
        *,
        stops: Sequence[str],
        prompt_tokens: int,
        seed: int,
        on_end: Callable[[], object] | None = None,
    ) -> None:
        self._raw = tokens
        self._on_end = on_end
        self._decoder = decoder
        self._scanner = StopScanner(stops)
        self._prompt_tokens = prompt_tokens
        self._seed = seed
        self._pieces: list[str] = []
        self._done = False
        self.tokens: list[int] = []
        """The tokens so far."""

    def __iter__(self) -> Stream:
        """Return itself."""
        return self

    def __next__(self) -> str:
        """Return the next piece of text that is complete; never an empty one."""
        while not self._done:
            token = next(self._raw, None)
            if token is None:
                self._done = True
                piece = self._flush()
            else:
                self.tokens.append(token)
                piece = self._push(token)
                if self._scanner.stopped:
                    self._done = True
            if self._done and self._on_end is not None:
                self._on_end()
            if piece:
                self._pieces.append(piece)
                return piece
        raise StopIteration

    def _push(self, token: int) -> str:
        if self._decoder is None:
            return ""
        return self._scanner.push(self._decoder.push(token))

    def _flush(self) -> str:
        if self._decoder is None:
            return ""
        return self._scanner.push(self._decoder.finish()) + self._scanner.finish()

    @property
    def finish_reason(self) -> str | None:
        """Why it ended, or ``None`` while it runs."""
        if not self._done:
            return None
        return "stop" if self._scanner.stopped else self._raw.finish_reason

    @property
    def metrics(self) -> dict[str, Any]:
        """Tokens and seconds of each phase so far."""
        metrics: dict[str, Any] = json.loads(self._raw.metrics())
        return metrics

    def result(self) -> Generation:
        """Generate what is left and return the whole."""
        for _ in self:
            pass
        return Generation(
            text="".join(self._pieces),
            tokens=list(self.tokens),
            finish_reason=self.finish_reason or "length",
            prompt_tokens=self._prompt_tokens,
            seed=self._seed,
            metrics=self.metrics,
        )
