"""PPL-p% sparsity: how much may be skipped for a given price.

From Sparsing Law: Towards Large Language Models with Greater Activation Sparsity
(arXiv 2411.02335): of a model's activation sparsity those thresholds are reported at which its
perplexity is ``p`` per cent above that of the dense model, so that models with any activation
function compare. The paper searches thresholds by the error of each layer's output (CETT). Here the
knob that is searched is the sparsity of a method of :mod:`nybble.sparsity`, so that methods
compare, too.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nybble.errors import ArgumentError
from nybble.eval.perplexity import measure

if TYPE_CHECKING:
    import numpy.typing as npt

    from nybble.runtime import LanguageModel
    from nybble.sparsity import SparsityMethod

__all__ = ["PplSparsity", "ppl_sparsity"]


@dataclass(frozen=True)
class PplSparsity:
    """What a search found.

    Parameters
    ----------
    percent
        What the perplexity may rise by.
    method
        The method's name.
    sparsity
        Its largest sparsity that was tried and stayed within that.
    perplexity, dense_perplexity
        With that sparsity, and without any.
    tried
        All sparsities with their perplexities, in the order in which they were tried.
    tokens
        Tokens of the text.
    """

    percent: float
    method: str
    sparsity: float
    perplexity: float
    dense_perplexity: float
    tried: tuple[tuple[float, float], ...]
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


def ppl_sparsity(
    model: "LanguageModel",
    text: "str | Path",
    windows: "npt.NDArray[np.integer[Any]]",
    percent: float,
    *,
    method: "SparsityMethod | None" = None,
    context: int = 1024,
    max_tokens: int | None = None,
    steps: int = 7,
    on_step: Callable[[int, int, float], None] | None = None,
) -> PplSparsity:
    """Find the sparsity that costs a share of the perplexity.

    The model goes back to dense when it is done.

    Parameters
    ----------
    model
        A model.
    text
        What its perplexity is measured on: a text, or a ``Path`` of a text file.
    windows
        Token ids ``[windows, context]`` by which thresholds are found.
    percent
        What the perplexity may rise by, in per cent.
    method
        How thresholds are found; its own sparsity does not matter. CHESS without one.
    context, max_tokens
        As for :func:`nybble.eval.perplexity`.
    steps
        Halvings of the interval from 0 to 1; each measures the perplexity once.
    on_step
        Called after each measurement with how many are done, how many there are, and the
        perplexity.

    Raises
    ------
    ArgumentError
        If ``percent`` is no positive number, or ``steps`` is not at least 1.
    """
    from nybble.sparsity import METHODS, Chess, find, observe

    if not (isinstance(percent, int | float) and math.isfinite(percent) and percent > 0):
        msg = f"percent: expected a positive number, found {percent!r}"
        raise ArgumentError(msg)
    if steps < 1:
        msg = f"steps: expected at least 1, found {steps}"
        raise ArgumentError(msg)
    method = Chess() if method is None else method
    name = next(name for name, kind in METHODS.items() if type(method) is kind)
    tried: list[tuple[float, float]] = []
    tokens = 0

    def surprise(sparsity: float) -> float:
        nonlocal tokens
        found = measure(
            model,
            text,
            prompt_tokens=1,
            context=context,
            max_tokens=max_tokens,
            on_window=None,
        )
        if sparsity > 0:
            tried.append((sparsity, found.perplexity))
        if on_step is not None:
            on_step(len(tried) + 1, steps + 1, found.perplexity)
        tokens = found.tokens
        return found.perplexity

    model.sparsify("off")
    dense = surprise(0.0)
    limit = dense * (1 + percent / 100)
    seen = observe(model.raw, windows)
    low, high, best = 0.0, 1.0, dense
    try:
        for _ in range(steps):
            middle = (low + high) / 2
            fitted = dataclasses.replace(method, sparsity=middle)  # type: ignore[type-var]
            model.sparsify(find(fitted, model.raw, windows, seen=seen), probe=False)
            value = surprise(middle)
            if value <= limit:
                low, best = middle, value
            else:
                high = middle
    finally:
        model.sparsify("off")
    return PplSparsity(percent, name, low, best, dense, tuple(tried), tokens)
