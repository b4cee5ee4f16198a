"""The loss on a continuation: what a model makes of the text behind a prompt.

Each window of a text is split into a prompt of ``prompt_tokens`` tokens and the rest. The prompt is
computed in one go, as a generation computes it, and only the tokens behind it are predicted. So two
settings that treat *prompts* differently (tokens of the prompt left out or merged, another cache of
keys and values) are compared on the very same tokens, none of which either of them has dropped.
With a prompt of one token this is the perplexity of the text.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.eval.perplexity import Perplexity, measure

if TYPE_CHECKING:
    from nybble.runtime import LanguageModel, Session


def continuation(
    model: "LanguageModel",
    text: "str | Path",
    *,
    prompt_tokens: int = 448,
    context: int = 512,
    max_tokens: int | None = None,
    session: "Session | None" = None,
    on_window: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Measure the loss and perplexity of the text behind prompts.

    Parameters
    ----------
    model
        Any model :func:`nybble.load` gives.
    text
        The text itself, or a ``Path`` of a file that :func:`nybble.eval.read_text` reads.
    prompt_tokens
        Tokens of each window that are the prompt.
    context
        Tokens a window, prompt and continuation together. Windows do not overlap; the last one may
        be shorter, and is left out where it is no longer than the prompt.
    max_tokens
        Use only that many tokens of the text.
    session
        The session to compute in, where it is not an ordinary one of ``model``; it is emptied.
    on_window
        Called after each window with the tokens read, the tokens in all, and the perplexity so far.

    Raises
    ------
    ArgumentError
        If a length does not fit the model or the other, or the text has no token behind a prompt.
    FormatError
        If the model's logits are not finite.
    """
    return measure(
        model,
        text,
        prompt_tokens=prompt_tokens,
        context=context,
        max_tokens=max_tokens,
        session=session,
        on_window=on_window,
    )
