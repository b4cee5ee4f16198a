"""From tokens to text while they come.

A token is not a piece of text: a character can be spread over several tokens, and what a token
looks like can depend on the one before it. :class:`TextDecoder` therefore decodes a short window
again with every token and shows the part that is new and complete. :class:`StopScanner` holds back
what may become a stop string, so that no part of one is ever shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["StopScanner", "TextDecoder"]

# How many tokens before the first new one give it its context (a leading space, for example).
_CONTEXT = 8
# An incomplete character has at most 3 bytes, hence at most 3 tokens. What stays undecodable for
# longer really is the replacement character.
_LONGEST_HOLD = 4


class TextDecoder:
    """Decodes one token after the other; the pieces joined are the whole text.

    Parameters
    ----------
    decode
        Decodes a list of tokens.
    context
        Tokens before the first one, already shown.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window, self._shown = self._clean(context)
        self._read = len(self._window)

    def _clean(self, context: Sequence[int]) -> tuple[list[int], str]:
        """Return the longest end of `context` that does not begin inside a character."""
        for length in range(min(_CONTEXT, len(context)), 0, -1):
            window = list(context[-length:])
            text = self._decode(window)
            if not text.startswith("\ufffd"):
                return window, text
        return [], ""

    def push(self, token: int) -> str:
        """Return the text that `token` completes; often empty."""
        self._window.append(token)
        text = self._decode(self._window)
        held = len(self._window) - self._read
        if text.endswith("\ufffd") and held < _LONGEST_HOLD:
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """Return what is still held back, with replacement characters where bytes are missing."""
        if self._read == len(self._window):
            return ""
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        # Decoders that tidy up spaces may change the end of what was already shown.
        piece = text[_shared(text, self._shown) :]
        if not piece:
            # A token without text (a special one) must not become the only context of the next.
            self._read = len(self._window)
            self._shown = text
            return ""
        # The tokens of this piece are the next one's context: they are whole characters.
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._shown = self._decode(self._window)
        return piece


def _shared(a: str, b: str) -> int:
    """Return how many characters `a` and `b` have in common at their beginning."""
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


class StopScanner:
    """Passes text on until one of the stop strings appears, which it swallows.

    Parameters
    ----------
    stops
        The strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Return the text that can be shown now."""
        if self.stopped:
            return ""
        if not self._stops:
            return piece
        self._held += piece
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max(self._overlap(stop) for stop in self._stops)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def finish(self) -> str:
        """Return what was held back and did not become a stop string."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """Return the length of the longest end of the text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
