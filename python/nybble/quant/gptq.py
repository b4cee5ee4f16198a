"""GPTQ: second-order rounding, column by column."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nybble import _nybble
from nybble.calibrate.inverse_factor import inverse_factor
from nybble.errors import ArgumentError, ConfigError
from nybble.quant.base import Floats, IntWeights, Quantizer, Scheme, within
from nybble.quant.rtn import Rtn

if TYPE_CHECKING:
    from nybble.calibrate.stats import InputStats

__all__ = ["Gptq"]


@dataclass(frozen=True)
class Gptq(Quantizer):
    """Weights are rounded one input after another; those to come make up for the error so far.

    Paper: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    arXiv 2210.17323. The correction for what earlier layers lost (``propagate``) is that of
    "Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization",
    arXiv 2504.09629.

    Formula, with the second moments ``H = X^T X / n`` of the inputs, damped by
    ``lambda = damping * mean(diag H)``, and ``U`` the upper Cholesky factor of
    ``(H + lambda)^-1``::

        for each column i:   q_i = nearest value of the group's grid to w_i
                             w_j = w_j - (w_i - q_i) / U_ii * U_ij     for the columns j after i

    and, before it, with the inputs ``X_ref`` of the original model,
    ``W = W + propagate * W (X_ref - X)^T X (n H + n lambda_p)^-1``: the weights that give the
    original outputs from the inputs there are now.

    Defaults: ``damping`` 0.01, the paper's code's; ``act_order``, ``true_sequential`` on, as in
    that code for small models. ``propagate`` 0: on a model of 135M parameters it took the loss of
    perplexity from 13.7 to 12.3 % with 8192 tokens of calibration and from 9.7 to 9.4 % with 24576,
    where three times the tokens do more for less time.

    Tried and lost, on that model (groups of 64 and 128, 4096 tokens of WikiText-2, where
    differences below 1 % are noise): damping of 0.1 (13.8 % with 24576 tokens) or by the median of
    the diagonal (11.1 %); counting tokens of massive activations less together with both (16.4 %
    with 8192 tokens, from 13.7); counting tokens by the squared gradient of the loss, linear by
    linear (13.0 % from 13.7, for twice the time); rounding again by coordinate descent with scales
    refitted in ``H``, which takes 8 % off a layer's squared error and nothing off the perplexity;
    98304 tokens in place of 24576 (21.13 and 21.15); rotating the residual stream and the heads'
    values by Hadamard matrices first (arXiv 2404.00456: 21.19 where it is 21.15 without, the
    values alone 21.71).
    None of the loss is the embedding's and the head's (8 bits: 9.7 %, in float 9.7 %); without
    rounding ``down`` 6.9 % are left. What helps is a tuning of the scales afterwards
    (:class:`nybble.quant.scale_tuning.ScaleTuning`).

    Parameters
    ----------
    damping
        Share of the mean diagonal that is added to it.
    act_order
        Whether columns with larger inputs come first.
    true_sequential
        Whether linears see the effect of those rounded before them in the same layer.
    propagate
        How much of the earlier layers' error is made up for: 0 to 1. Above 0 the original model
        is run beside the rounded one, which takes half as long again.
    """

    damping: float = 0.01
    act_order: bool = True
    true_sequential: bool = True
    propagate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("act_order", "true_sequential"):
            if not isinstance(value := getattr(self, name), bool):
                message = f"recipe: gptq: {name}: expected true or false, found {value!r}"
                raise ConfigError(message)
        within("gptq: damping", self.damping, 0, 10)
        within("gptq: propagate", self.propagate, 0, 1)

    @property
    def needs(self) -> frozenset[str]:
        """Second moments, and with `propagate` the original model's inputs."""
        return frozenset({"gram", "reference"} if self.propagate else {"gram"})

    @property
    def stepwise(self) -> bool:
        """``true_sequential``."""
        return self.true_sequential

    def quantize(
        self,
        weights: Floats,
        scheme: Scheme,
        *,
        inputs: InputStats | None = None,
        threads: int | None = None,
    ) -> IntWeights:
        """Round `weights`; see :meth:`nybble.quant.base.Quantizer.quantize`.

        Raises
        ------
        ArgumentError
            When the inputs are not as many as the columns, or second moments are missing.
        """
        if inputs is None:
            return Rtn().quantize(weights, scheme, threads=threads)
        cols = weights.shape[1]
        if inputs.gram.shape != (cols, cols):
            message = f"inputs: expected second moments of {cols} channels, "
            message += f"found an array of shape {list(inputs.gram.shape)}"
            raise ArgumentError(message)
        if not inputs.gram.any():  # nothing ever came in: all weights are as good
            plain = Rtn().quantize(weights, scheme, threads=threads)
            return replace(plain, note="its inputs were all zero")
        if self not in inputs.derived:
            inputs.derived[self] = self._metric(inputs)
        metric = inputs.derived[self]
        if metric.correction is not None:
            weights = weights + weights @ metric.correction
        codes, scales, zeros = _nybble.gptq(
            np.ascontiguousarray(weights, dtype=np.float32),
            scheme.bits,
            cols if scheme.group is None else scheme.group,
            scheme.zeros,
            metric.factor,
            metric.order,
            metric.importance,
            threads,
        )
        return IntWeights(codes, scales, zeros, scheme.bits, metric.note)

    def _metric(self, inputs: InputStats) -> _Metric:
        gram = inputs.gram / inputs.count
        diagonal = np.diagonal(gram)
        order = np.argsort(-diagonal, kind="stable") if self.act_order else None
        factor, damping = inverse_factor(gram, self.damping, order)
        # 1 / diag H^-1: how much an error of this weight costs when all others make up for it.
        importance = np.empty(len(gram), dtype=np.float32)
        conditional = 1 / np.square(factor, dtype=np.float64).sum(axis=0)
        importance[slice(None) if order is None else order] = conditional / conditional.mean()
        correction = None
        if self.propagate:
            damped = gram + max(self.damping, 0.01) * diagonal.mean() * np.eye(len(gram))
            solved = np.linalg.solve(damped, (inputs.drift / inputs.count).T).T
            correction = (self.propagate * solved).astype(np.float32)
        return _Metric(
            factor,
            None if order is None else order.astype(np.uint32),
            importance,
            correction,
            "" if damping == self.damping else f"damping {damping:g}: the inputs are dependent",
        )


@dataclass(frozen=True)
class _Metric:
    """What the linears that share inputs share.

    ``W + W correction`` are the weights that give the original outputs from the inputs there are
    now; the other fields are what the core's sweep takes.
    """

    factor: Floats
    order: npt.NDArray[np.uint32] | None
    importance: Floats
    correction: Floats | None
    note: str
