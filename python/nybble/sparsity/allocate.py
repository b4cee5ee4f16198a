"""How much of each layer is zero, where the mean over all layers is given.

TEAL (arXiv 2408.14690, algorithm 1) shares a block's sparsity out among its linears, greedily, by
the error of the block's output. What a layer's error does to the predictions is not seen there, and
a layer that errs little may be one that all others build on. Here layers share a model's sparsity,
and the cost is that of the whole model: the divergence of its predictions from those of the dense
one. It is looked at where the result will be, with all layers sparse: one layer at a time is made
somewhat less and somewhat more so.

Of SmolLM2-135M's perplexity on 4096 tokens, 17.29 dense and 21.20 with CHESS at 50 % everywhere,
this makes 20.74; most early layers end at 0.4 to 0.5, the last ones at 0.6 to 0.7.

Tried and lost: one layer sparse at a time among dense ones (256 tokens, three shares), whose costs
do not add up: +25.1 % of perplexity where equal shares cost 22.7. Straight lines between the three
shares, by which most layers stay at the middle one: 20.98. The Fisher information of neurons, from
a backward pass over 8192 tokens (in floats, on 2048 others, where equal shares cost 28.4 %): with
one threshold for all layers +28.2 %; with CHESS within layers and that between them +25.5 %, for
which torch would be needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nybble.eval.losses import compare_logits
from nybble.sparsity.base import Seen, SparsityMethod, Thresholds, observe

if TYPE_CHECKING:
    from nybble import _nybble

__all__ = ["find", "spread"]

Doubles = npt.NDArray[np.float64]
Method = TypeVar("Method", bound=SparsityMethod)

_STEP = 0.2  # how far a layer may be from the mean
_FINE = 17  # shares that are chosen from
_TOKENS = 512  # tokens by which costs are measured
_WINDOW = 256  # of which so many are one text


def find(
    method: SparsityMethod,
    model: _nybble.Model,
    windows: npt.NDArray[np.integer[Any]],
    *,
    seen: Sequence[Seen] | None = None,
    progress: bool = False,
) -> list[Thresholds]:
    """Return the thresholds of all layers.

    Parameters
    ----------
    method
        How thresholds are found; its ``allocate`` says which layers get how much of its sparsity.
    model
        The extension's model.
    windows
        Token ids ``[windows, context]``.
    seen
        What :func:`nybble.sparsity.observe` made of them, if it is known.
    progress
        Show a progress bar on stderr while costs are measured.
    """
    seen = observe(model, windows) if seen is None else seen
    shares = np.full(len(seen), method.sparsity)
    if method.allocate == "greedy" and method.sparsity > 0:
        shares = _greedy(method, model, windows, seen, progress=progress)
    return [_at(method, share).fit(layer) for share, layer in zip(shares, seen, strict=True)]


def _at(method: Method, share: float) -> Method:
    return dataclasses.replace(method, sparsity=float(share))  # type: ignore[type-var]


def _greedy(
    method: SparsityMethod,
    model: _nybble.Model,
    windows: npt.NDArray[np.integer[Any]],
    seen: Sequence[Seen],
    *,
    progress: bool,
) -> Doubles:
    from nybble import _nybble

    texts = [
        np.ascontiguousarray(window[:_WINDOW], dtype=np.uint32)
        for window in windows[: max(1, _TOKENS // _WINDOW)]
    ]
    wanted = [model.session(dense=True).forward(text, "all") for text in texts]

    def cost(thresholds: Sequence[Thresholds]) -> float:
        """Return the mean divergence of the predictions from the dense ones, in nats a token."""
        sparse = _nybble.Sparsity(model, [layer.raw() for layer in thresholds])
        found = []
        for text, dense in zip(texts, wanted, strict=True):
            logits = model.session(sparsity=sparse).forward(text, "all")
            found.append(compare_logits(dense, logits, text).divergence)
        return float(np.concatenate(found).mean())

    middle = method.sparsity
    step = min(_STEP, middle, (1 - middle) / 2)
    shares = np.array([middle - step, middle, middle + step])
    usual = [method.fit(layer) for layer in seen]
    costs = np.full((len(seen), 3), cost(usual))
    with tqdm(
        total=2 * len(seen), desc="allocate", disable=not progress, dynamic_ncols=True
    ) as bar:
        for index, layer in enumerate(seen):
            for column, share in ((0, shares[0]), (2, shares[2])):
                tried = list(usual)
                tried[index] = _at(method, share).fit(layer)
                costs[index, column] = cost(tried)
                bar.update()
    sizes = np.array([layer.act.shape[1] for layer in seen], dtype=np.float64)
    return spread(*between(costs, shares), sizes, middle)


def between(costs: Doubles, shares: Doubles) -> tuple[Doubles, Doubles]:
    """Return costs and shares with more of them in between, on the parabolas of three each.

    Costs rise ever faster with the share, so that on straight lines between three of them most
    layers would stay at the middle one.
    """
    fine = np.linspace(shares[0], shares[-1], _FINE)
    middle = shares[1]
    parabolas = [np.polyfit(shares - middle, row, 2) for row in costs]
    return np.array([np.polyval(found, fine - middle) for found in parabolas]), fine


def spread(costs: Doubles, shares: Doubles, sizes: Doubles, mean: float) -> Doubles:
    """Return each layer's share so that the costs' sum is least.

    All layers begin with the smallest share; the one to which more costs least, by its size, gets
    it first, until the mean is reached. Between the shares costs are on the lower convex hull of
    those given, so that nothing is cheaper than what this finds.

    Parameters
    ----------
    costs
        What each layer costs with each share ``[layers, shares]``.
    shares
        The shares, rising.
    sizes
        Neurons of each layer.
    mean
        The mean share wanted, of all neurons; within the shares.
    """
    steps = []  # cost of a neuron, layer, share
    for layer, row in enumerate(costs):
        at = 0
        while at + 1 < len(shares):
            slopes = (row[at + 1 :] - row[at]) / (shares[at + 1 :] - shares[at])
            to = at + 1 + int(np.argmin(slopes))
            steps.append((slopes[to - at - 1] / sizes[layer], layer, shares[to] - shares[at]))
            at = to
    found = np.full(len(costs), shares[0], dtype=np.float64)
    left = (mean - shares[0]) * sizes.sum()
    for _, layer, step in sorted(steps):
        more = min(step, max(left, 0.0) / sizes[layer])
        found[layer] += more
        left -= more * sizes[layer]
    return found
