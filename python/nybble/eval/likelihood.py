"""The log-likelihood of a continuation after a prompt, for many of them one after the other.

What a prompt shares with the one before it is not computed again: the continuations of one prompt
cost one pass over the prompt and one over each of them, and continuations of one token nothing but
the prompt. That changes no bit of the result, since the rows of a pass do not depend on each other.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble.errors import ArgumentError, ContextError, FormatError
from nybble.eval.losses import token_losses
from nybble.eval.windows import CHUNK

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nybble.runtime import LanguageModel, Tokenizer


@dataclass(frozen=True)
class Likelihood:
    """What a continuation measured.

    Parameters
    ----------
    logprob
        The sum of its tokens' log-probabilities, in nats.
    greedy
        Whether each of its tokens was the likeliest one.
    tokens
        Number of its tokens.
    computed
        Tokens the model computed for it.
    dropped
        Tokens left out at the beginning of the prompt, because the context holds no more.
    """

    logprob: float
    greedy: bool
    tokens: int
    computed: int
    dropped: int


class Scorer:
    """Scores continuations in one session of a model.

    Parameters
    ----------
    model
        The model.
    limit
        Most tokens a text may have, if fewer than the model's context.
    """

    def __init__(self, model: "LanguageModel", limit: int | None = None) -> None:
        self.limit = model.context if limit is None else min(limit, model.context)
        self._model = model
        self._session = model.session()
        self._prompt: list[int] | None = None
        self._behind: npt.NDArray[np.float32] | None = None  # logits behind the prompt, [1, vocab]

    def score(self, prompt: list[int], continuation: list[int]) -> Likelihood:
        """Return the log-likelihood of ``continuation`` behind ``prompt``, both as tokens.

        Where the two are longer than the context, tokens are dropped from the left of the prompt.
        The last token is predicted and never computed, so a text may be one token longer than the
        context, as in lm-evaluation-harness.

        Raises
        ------
        ArgumentError
            If one of them is empty.
        ContextError
            If the continuation alone does not fit.
        FormatError
            If the logits are not finite.
        """
        for name, tokens in (("prompt", prompt), ("continuation", continuation)):
            if not tokens:
                msg = f"{name}: expected at least one token, found none"
                raise ArgumentError(msg)
        if len(continuation) > self.limit:
            msg = (
                f"continuation: expected at most the {self.limit} tokens of the context, "
                f"found {len(continuation)}"
            )
            raise ContextError(msg)
        dropped = max(len(prompt) + len(continuation) - (self.limit + 1), 0)
        first, computed = self._after(prompt[dropped:])
        losses = token_losses(first, continuation[:1])
        total = [float(losses[0])]
        greedy = bool(first[0].argmax() == continuation[0])
        inputs = continuation[:-1]
        for start in range(0, len(inputs), CHUNK):
            piece = inputs[start : start + CHUNK]
            targets = continuation[start + 1 : start + 1 + len(piece)]
            logits = self._session.forward(piece, "all")
            computed += len(piece)
            total.extend(token_losses(logits, targets).tolist())
            greedy = greedy and bool((logits.argmax(axis=1) == targets).all())
        logprob = -math.fsum(total)
        if not math.isfinite(logprob):
            msg = f"{self._model.path}: the model's logits are not finite"
            raise FormatError(msg)
        return Likelihood(logprob, greedy, len(continuation), computed, dropped)

    def _after(self, prompt: list[int]) -> "tuple[npt.NDArray[np.float32], int]":
        """Compute a prompt, as far as it is new; return the logits behind it and what it took."""
        if self._behind is not None and prompt == self._prompt:
            self._session.truncate(len(prompt))
            return self._behind, 0
        self._prompt, self._behind = None, None  # of no use if what follows fails
        if self._model.info["tokens"] is not None:
            self._session.truncate(0)  # a reduced prompt is not to depend on the one before it
        rest = self._session.rewind(prompt)
        self._behind = self._session.forward(rest, "last", prompt=True)
        self._prompt = prompt
        return self._behind, len(rest)


def encode_pair(
    tokenizer: "Tokenizer", prompt: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt and of what continues it.

    As lm-evaluation-harness does it: spaces at the end of the prompt go over to the continuation,
    whose tokens are those of the whole text behind the number of tokens the prompt has alone. An
    empty prompt is the begin token, or the end token where there is none.

    Raises
    ------
    ArgumentError
        If nothing is left of the continuation, or an empty prompt has no token to stand for it.
    """
    bare = prompt.rstrip()
    continuation, prompt = prompt[len(bare) :] + continuation, bare
    before = tokenizer.encode(prompt)
    if prompt:
        behind = tokenizer.encode(prompt + continuation)[len(before) :]
    else:
        before = before or prefix(tokenizer)
        behind = tokenizer.encode(continuation, add_special_tokens=False)
    if not behind:
        msg = f"continuation: expected at least one token behind the prompt, found {continuation!r}"
        raise ArgumentError(msg)
    return before, behind


def prefix(tokenizer: "Tokenizer") -> list[int]:
    """Return the token that stands for an empty prompt: the begin token, else the end token.

    Raises
    ------
    ArgumentError
        If the tokenizer has neither.
    """
    for name in ("bos_token", "eos_token"):
        token = tokenizer.token_id(tokenizer.special_tokens.get(name, ""))
        if token is not None:
            return [token]
    msg = f"prompt: expected some text, since {tokenizer.where} has neither begin nor end token"
    raise ArgumentError(msg)
