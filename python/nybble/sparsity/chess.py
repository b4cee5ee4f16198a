"""CHESS: thresholds by channel, and chosen inputs of attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nybble.sparsity.base import Seen, SparsityMethod, Thresholds, allocation, quantile, share

__all__ = ["Chess"]


@dataclass(frozen=True)
class Chess(SparsityMethod):
    """Skip the neurons whose gate, times what it usually multiplies, is among the smallest.

    Paper: CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective
    Sparsification (arXiv 2409.01366).

    Formula, with ``g`` the activation function's value and ``u`` the output of up of neuron ``i``,
    and expectations over calibration tokens::

        importance_i(x) = |g_i(x)| E|u_i|
        T   = the k-quantile of the importance, over tokens and neurons
        t_i = T / E|u_i|,    neuron i is 0 where |g_i| <= t_i

    Where all ``E|u_i|`` are equal this is CATS. In attention the inputs of queries and of the
    output projection are cut at a quantile of their magnitude; keys and values are computed from
    all of theirs, because an error in them stays in the cache.

    Parameters
    ----------
    sparsity
        The paper's ``k``: the share of neurons that is skipped; 0.5 there.
    attention
        The share of the inputs of queries and of the output projection that is 0. The paper takes
        ``k`` here, too. 0 here, the method without attention of its tables: cut inputs cost
        accuracy, and their columns are skipped only where a measurement finds that faster.
    allocate
        ``uniform`` for the same sparsity in all layers, ``greedy`` for shares that differ so that
        the predictions change least (:mod:`nybble.sparsity.allocate`).

    What differs here: magnitudes and not squares, as in the paper's text (its first code has
    ``sqrt(T / E[u_i^2])``); the model is calibrated as it is rounded.

    What it costs: small models are less sparse than those of the paper. Rise of the perplexity of
    SmolLM2-135M (4-bit weights, 8-bit activations) on 4096 tokens of WikiText-2, thresholds found
    on 16384 tokens of its other half, by the share of neurons that is skipped::

        sparsity    30 %      50 %      70 %
        chess      +3.6 %   +21.9 %    +119 %
        cats       +4.5 %   +32.8 %    +258 %

    What a better choice could reach: where every layer keeps at each token the half with the
    largest ``|g_i u_i|``, which only computing all of them tells, the perplexity rises by 4.9 % on
    2048 tokens (in float), with CHESS by 28.4 %; with ``|g_i u_i|`` times the norm of the column of
    ``down`` by 5.2 %. The gate alone does not know. What helps is ``allocate: greedy``, a little,
    and ``tuning: scales`` in the recipe, which trains with the zeros in place
    (:class:`nybble.quant.ScaleTuning`).

    Tried on the same model at 50 %, and left out for what little it gave:

    * Least squares for ``down`` on what is left of its inputs (in float): with 16384 tokens of
      calibration and the damping that is best on other text, the error of a layer's output falls
      there from 0.274 to 0.261 (layer 3) and from 0.291 to 0.271 (layer 12); with 4096 tokens to
      0.267 and 0.282. With a damping of 0.01 it rises to 0.39 and 0.38, and, on 5120 tokens, in all
      layers and beside the last point below, the perplexity by 42 % instead of 37 %.
    * A bias for the mean of what is left out: 0.272 and 0.290 in the place of 0.274 and 0.291.
    * ``E|u_i|`` over the half of the tokens in which the neuron's gate is smallest: 23.43 in the
      place of 23.85 on 3072 tokens. Its root mean square over all tokens: 23.71.
    * Importance times the norm of the neuron's column of ``down``: +37 % instead of +31 % on 2048
      tokens (in float).
    """

    sparsity: float = 0.5
    attention: float = 0.0
    allocate: str = "uniform"

    def __post_init__(self) -> None:
        share("sparsity", self.sparsity)
        share("attention", self.attention)
        allocation(self.allocate)

    def fit(self, seen: Seen) -> Thresholds:
        """Return the thresholds of a layer."""
        size = np.abs(seen.act)
        weight = seen.up_mean.astype(np.float32)
        limit = quantile(size * weight, self.sparsity)
        neurons = np.zeros_like(weight)
        if limit > 0:
            # A neuron that is always multiplied by 0 does nothing: no gate is large enough.
            with np.errstate(divide="ignore"):
                neurons = np.float32(limit) / weight
        inputs = {}
        if self.attention:
            inputs = {
                "q": quantile(np.abs(seen.inputs["qkv"]), self.attention),
                "out": quantile(np.abs(seen.inputs["out"]), self.attention),
            }
        return Thresholds(neurons, inputs, active=float((size > neurons).mean()))
