"""How far a model's predictions are from a reference's, usually the float model it came from.

For every predicted token of a text, with the reference's distribution `p` over the vocabulary and
the model's `q`: the Kullback-Leibler divergence ``KL(p || q) = sum(p * log(p / q))``, and whether
the likeliest token is the same. Unlike a perplexity this does not depend on which token the text
had next, so it tells two good compressions apart with far less text.

The windows are those of :mod:`nybble.eval.perplexity`. Both models compute the same few tokens in
turn and their logits are compared at once, so what is held is a chunk of each, never a window.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nybble.errors import ArgumentError
from nybble.eval.losses import Tally, compare_logits
from nybble.eval.perplexity import Meter, Perplexity, text_tokens
from nybble.eval.text import read_text
from nybble.eval.windows import cut, predictions

if TYPE_CHECKING:
    from nybble.runtime import LanguageModel

_Step: TypeAlias = tuple[npt.NDArray[np.float32], list[int]]


@dataclass(frozen=True)
class Agreement:
    """How a model's predictions compare with a reference's.

    Standard errors are over windows, as those of a perplexity, and ``None`` for one window.

    Parameters
    ----------
    kl, kl_stderr, kl_max
        Mean ``KL(reference || model)`` a token in nats, its standard error, and the largest one.
    top1, top1_stderr
        Share of the tokens for which both have the same likeliest token, from 0 to 1.
    loss_difference, loss_difference_stderr
        The model's mean loss less the reference's, in nats. As both read the same tokens its error
        is much smaller than that of either loss.
    model, reference
        The perplexities of the two; their times are those of the forward passes alone.
    """

    kl: float
    kl_stderr: float | None
    kl_max: float
    top1: float
    top1_stderr: float | None
    loss_difference: float
    loss_difference_stderr: float | None
    model: Perplexity
    reference: Perplexity

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


def agreement(
    model: "LanguageModel",
    reference: "LanguageModel",
    text: "str | Path",
    *,
    context: int = 1024,
    prompt_tokens: int = 1,
    max_tokens: int | None = None,
    on_window: Callable[[int, int, float], None] | None = None,
) -> Agreement:
    """Compare a model's predictions with those of a reference, on a text.

    Parameters
    ----------
    model, reference
        Two models with the same tokenizer; both are in memory.
    text
        The text itself, or a ``Path`` of a file that :func:`nybble.eval.read_text` reads.
    context, prompt_tokens, max_tokens
        As for :func:`nybble.eval.continuation`; with one token of prompt, as for a perplexity.
    on_window
        Called after each window with the tokens read, the tokens in all, and the mean divergence.

    Raises
    ------
    ArgumentError
        If the two encode the text differently, or a length does not fit.
    FormatError
        If the logits of one of them are not finite.
    """
    if isinstance(text, Path):
        text = read_text(text)
    tokens = _same_tokens(model, reference, text, max_tokens)
    limit = min(model.context, reference.context)
    windows = cut(tokens, context=context, limit=limit, prompt_tokens=prompt_tokens)
    sides = Meter(reference, prompt_tokens), Meter(model, prompt_tokens)
    sessions = reference.session(), model.session()
    divergence, same, difference = Tally(), Tally(), Tally()
    largest = 0.0
    for window in windows:
        steps = (
            _timed(side, predictions(session, window, prompt_tokens))
            for side, session in zip(sides, sessions, strict=True)
        )
        for (a, targets), (b, _) in zip(*steps, strict=True):
            found = compare_logits(a, b, targets)
            sides[0].add(found.reference_losses)
            sides[1].add(found.losses)
            divergence.add(found.divergence)
            same.add(found.same_top.astype(np.float64))
            difference.add(found.losses - found.reference_losses)
            largest = max(largest, float(found.divergence.max()))
        for side in sides:
            side.close(window)
        for tally in (divergence, same, difference):
            tally.close()
        if on_window is not None:
            on_window(sides[0].read, len(tokens), divergence.mean)
    return Agreement(
        kl=divergence.mean,
        kl_stderr=divergence.standard_error,
        kl_max=largest,
        top1=same.mean,
        top1_stderr=same.standard_error,
        loss_difference=difference.mean,
        loss_difference_stderr=difference.standard_error,
        model=sides[1].result(context),
        reference=sides[0].result(context),
    )


def _timed(side: Meter, steps: Iterator[_Step]) -> Iterator[_Step]:
    """Give the steps, and count the time they take."""
    while True:
        start = time.perf_counter()
        step = next(steps, None)
        side.seconds += time.perf_counter() - start
        if step is None:
            return
        yield step


def _same_tokens(
    model: "LanguageModel", reference: "LanguageModel", text: str, max_tokens: int | None
) -> list[int]:
    """Return the tokens of a text after making sure that they are the same for both models."""
    if model.vocab_size != reference.vocab_size:
        msg = (
            f"reference: expected the vocabulary of {model.path}, {model.vocab_size} tokens, "
            f"found {reference.vocab_size} in {reference.path}: predictions of models with "
            "different tokenizers do not compare"
        )
        raise ArgumentError(msg)
    tokens = text_tokens(model, text, max_tokens)
    others = text_tokens(reference, text, max_tokens)
    if tokens != others:
        pairs = zip(tokens, others, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(others)))
        msg = (
            f"reference: expected the tokenizer of {model.path}, but {reference.path} encodes the "
            f"text differently from token {place} on: predictions of models with different "
            "tokenizers do not compare"
        )
        raise ArgumentError(msg)
    return tokens
