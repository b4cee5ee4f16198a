"""How much tokens matter and which are alike: scores that token reduction is made of.

Everything here takes NumPy arrays of float32 and is computed by the Rust core, with the same bits
for any number of threads. Attention is ``[heads, n, n]``: rows are queries and sum to 1, as a
softmax leaves them. What the run-time uses while it computes is the same code.

The functions follow Zero-TPrune (Wang et al., CVPR 2024, arXiv 2305.17328), which has no public
official code, ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461) and EViT (Liang et al., ICLR 2022,
arXiv 2202.07800); where a paper leaves something open, the function says what was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nybble import _nybble
from nybble.errors import ArgumentError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Places = npt.NDArray[np.uintp]

__all__ = [
    "VARIANCES",
    "AttentionGraph",
    "Ranks",
    "best_matches",
    "bipartite",
    "cosines",
    "emphasise",
    "informative_heads",
    "pagerank",
    "pagerank_iterations",
    "query_row",
    "received",
    "top_k",
]

VARIANCES = (0.01, 0.7)
"""Least and largest variance of a head that is kept, in Zero-TPrune."""


@dataclass(frozen=True)
class Ranks:
    """Scores by :func:`pagerank`.

    Parameters
    ----------
    scores
        ``[heads, n]``; each head's sum to 1.
    iterations
        Steps that each head took.
    """

    scores: Floats
    iterations: tuple[int, ...]


class AttentionGraph:
    """Attention as a graph to vote on, many times smaller than its probabilities.

    Each probability takes two bytes (a brain float), or one (5 bits of exponent, 3 of mantissa)
    where there are more than four million of them; votes are sums of hundreds, in which their
    rounding hardly shows. The run-time's attention leaves this graph instead of a matrix, so what
    :class:`nybble.tokens.ZeroTPrune` pays for is the voting alone.

    Parameters
    ----------
    attention
        ``[heads, n, n]``, rows with sum 1.
    threads
        Threads to use.
    """

    def __init__(self, attention: Floats, *, threads: int | None = None) -> None:
        self.raw = _nybble.AttentionGraph(attention, threads)

    @property
    def shape(self) -> tuple[int, int]:
        """Heads and tokens."""
        return self.raw.shape


def pagerank(
    attention: Floats | AttentionGraph,
    *,
    iterations: int = 50,
    tolerance: float = 1e-6,
    damping: float = 1.0,
    class_token: int | None = None,
    class_factor: float | None = None,
    extrapolate: bool = False,
    threads: int | None = None,
) -> Ranks:
    """Score tokens by weighted PageRank of each head's attention.

    Zero-TPrune's importance: ``s <- transpose(A) s``, a token has the score that the others give
    it. The paper's factor 1/N is a constant, left out here: scores always sum to 1.

    Parameters
    ----------
    attention
        ``[heads, n, n]``, or a graph of it.
    iterations
        Most steps; the paper's number for a layer is :func:`pagerank_iterations`.
    tolerance
        Ends a head when a step changes its scores by less in all; with 0 all steps are done.
    damping
        Share of the votes; the rest falls on all tokens equally. The paper has 1.
    class_token
        A token that begins with a larger score than the others, which are equal.
    class_factor
        How many times larger; by default the square root of ``n``, as the paper's variant has it.
    extrapolate
        Whether a step begins with what the last ones lead to (Anderson acceleration, J. ACM 12,
        1965) and not with what the last one made: the same fixed point in far fewer steps.
    threads
        Threads that heads are shared out to.

    Raises
    ------
    ArgumentError
        For another shape or settings out of range.
    """
    settings = (
        _positive("iterations", iterations, least=0),
        tolerance,
        damping,
        None if class_token is None else _positive("class_token", class_token, least=0),
        class_factor,
        extrapolate,
        threads,
    )
    if isinstance(attention, AttentionGraph):
        scores, steps = attention.raw.pagerank(*settings)
    else:
        scores, steps = _nybble.pagerank(attention, *settings)
    return Ranks(scores, tuple(steps))


def pagerank_iterations(layer: int, depth: int) -> int:
    """Return Zero-TPrune's number of steps behind layer `layer` (from 0) of `depth`.

    The paper says 30 to 50 in the first three layers, 5 to 10 in the middle and 1 in the deep ones.
    Chosen here: the smaller number of each range, and the last third is deep.
    """
    return _nybble.pagerank_iterations(
        _positive("layer", layer, least=0), _positive("depth", depth, least=1)
    )


def received(attention: Floats, *, threads: int | None = None) -> Floats:
    """Return what each token is given, the mean over heads and queries: ``[n]`` with sum 1."""
    return _nybble.attention_received(attention, threads)


def query_row(attention: Floats, query: int = 0) -> Floats:
    """Return what one query gives each token, the mean over heads: ``[n]`` with sum 1.

    The row of the class token is EViT's score.
    """
    return _nybble.attention_row(attention, _positive("query", query, least=0))


def informative_heads(scores: Floats, variances: tuple[float, float] = VARIANCES) -> list[bool]:
    """Return which heads tell tokens apart: Zero-TPrune's variance-based head filter.

    Parameters
    ----------
    scores
        ``[heads, n]``.
    variances
        Least and largest variance of a head that is kept. How the paper scales scores before is
        not stated; here each head's have mean 1, so that equal ones have variance 0 and all on one
        token ``n - 1``. Where no head is in the range all are kept.
    """
    return _nybble.informative_heads(scores, *variances)


def emphasise(scores: Floats, kept: list[bool] | None = None) -> Floats:
    """Return the root mean square over the kept heads: ``[n]``.

    Zero-TPrune's emphasis on informative regions: what one head cannot do without stays.

    Parameters
    ----------
    scores
        ``[heads, n]``.
    kept
        The heads to use; by default all.
    """
    return _nybble.emphasise(scores, [True] * len(scores) if kept is None else kept)


def cosines(a: Floats, b: Floats, *, threads: int | None = None) -> Floats:
    """Return the cosines of the rows of ``a [n, dim]`` and ``b [m, dim]``: ``[n, m]``."""
    return _nybble.cosines(a, b, threads)


def best_matches(a: Floats, b: Floats, *, threads: int | None = None) -> tuple[Places, Floats]:
    """Return for each row of `a` the row of `b` with the largest cosine, and that cosine.

    Of equal ones the first. No matrix of all cosines is held.
    """
    return _nybble.best_matches(a, b, threads)


def bipartite(
    features: Floats, count: int, *, protected: int = 0, threads: int | None = None
) -> tuple[Places, Places]:
    """Return ToMe's pairs: the tokens that are merged, ascending, and those they are merged into.

    Parameters
    ----------
    features
        ``[n, dim]``; ToMe takes the mean over heads of the keys. Compared by cosine.
    count
        Most pairs. Tokens in even places go, into ones in odd places.
    protected
        Tokens at the beginning that are left out, such as the class token.
    threads
        Threads to use.
    """
    return _nybble.bipartite(
        features,
        _positive("count", count, least=0),
        _positive("protected", protected, least=0),
        threads,
    )


def top_k(scores: Floats, k: int) -> Places:
    """Return the places of the `k` highest scores, ascending; of equal ones the first.

    Not sorted on the way: the time grows with the scores only. A NaN is below all numbers.
    """
    return _nybble.top_k(scores, _positive("k", k, least=0))


def _positive(name: str, value: int, *, least: int) -> int:
    if isinstance(value, bool) or int(value) != value or value < least:
        message = f"{name}: expected a whole number of at least {least}, found {value!r:.60}"
        raise ArgumentError(message)
    return int(value)
