"""Tuning of what is not an integer: scales and gains, by the original's predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nybble.errors import FormatError
from nybble.quant.base import Floats, within
from nybble.quant.trainable import Linear, descend, parameter, scaled, shifted, trainable

__all__ = ["ScaleTuning", "Tuned"]

_SCALE_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Tuned:
    """What a tuning has found.

    Parameters
    ----------
    scales
        Scales by linear ``[rows, groups]``, exactly representable in float16.
    zeros
        Zero points ``[rows, groups]`` in codes, multiples of 1/16, by those linears whose zero
        points may be fractions.
    gains
        Gains of norms by tensor.
    divergences
        What each step found before it changed anything, in nats a token.
    """

    scales: dict[str, Floats]
    zeros: dict[str, Floats]
    gains: dict[str, Floats]
    divergences: list[float]


@dataclass(frozen=True)
class ScaleTuning:
    """Scales, zero points and norm gains are trained towards the original's predictions.

    Paper: "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models",
    arXiv 2407.11062 (its second phase, end-to-end training of quantization parameters). That the
    original's predictions are the target is LLM-QAT's, arXiv 2305.17888; that norm gains are
    tuned as well is Norm Tweaking's, arXiv 2309.02784.

    Formula, for the integers ``q`` that a method has chosen and that stay as they are::

        w = s (1 + t) (q - z - d),   gain = g (1 + u),   minimise over t, d, u:  KL(p_original || p)

    with ``d`` only where zero points may be sixteenths of a code.

    Rounding of activations is done as while running, and taken for the identity by the gradient.

    Defaults: a pass over 32768 tokens, Adam at rates that rise over the first tenth of the steps
    and fall to nothing by a cosine. Zero points stay: on a model of 135M parameters moving them
    (``zero_rate`` 0.005) took the perplexity after 16 steps to 20.37 in place of 20.50; after 64,
    with a ``rate`` of 0.0015, from 21.15 to 20.16, where 0.001 without it goes from 20.91 to 20.01.
    Three times the tokens end at 20.21, no better within what these 8192 tokens of text can tell
    (on 65536 tokens, 24.69 where the original has 23.30).

    Tried and lost, on that model: training the integers as well, with rounding taken for the
    identity. Towards the original's predictions it takes the divergence from 0.14 to 0.63 nats
    within 8 steps already at 0.0005 of a code a step (Adam; 1.29 at 0.01), since one window's
    gradient moves every weight that is near the middle of two codes. Begun at the codes themselves,
    so that only a gradient that keeps its sign moves one, 0.03 of a code a step has moved 0.02 % of
    them after 64 steps and gained nothing; at 0.1 the divergence is 3 nats after 16. Begun at the
    chosen code plus what the original weight's own rounding left, 0.002 of a code a step moves
    0.04 % of them in 32 steps, 0.02 of a code 2.6 % in 15, which takes 0.13 nats to 0.29. Layer by
    layer, as in the paper's first phase (three passes over 24576 tokens, 0.0005 of a code a step),
    it takes 22 and 12 % off the first two layers' squared error on other text; scales alone 5 and 2
    %.

    With activation sparsity (`masks`) what is left of the values makes up for what is not: of
    SmolLM2-135M's perplexity on 4096 tokens, 17.29 dense and 21.20 with half of its neurons skipped
    (CHESS), 24 steps leave 19.54; 256 at a ``rate`` of 0.002, layers' shares by ``greedy``, 19.38.
    Without the masks there is little to train: the divergence is 0.005 nats in the place of 0.17.

    What differs: relative changes ``t`` and ``u`` in the place of the scales themselves, so that
    one rate does for all; a thousandth of the paper's tokens. The whole model is in memory twice in
    float32, and the last bits of the result depend on the number of threads.

    Parameters
    ----------
    tokens
        Tokens of calibration text, rounded up to whole windows: other windows than the
        calibration's.
    context
        Tokens a window; each is a step.
    rate
        Greatest relative change of a scale in a step.
    zero_rate
        Greatest move of a zero point in a step, in codes; 0 leaves them where they are.
    """

    tokens: int = 32768
    context: int = 512
    rate: float = 1e-3
    zero_rate: float = 0.0

    def __post_init__(self) -> None:
        within("scales: tokens", self.tokens, 1, 1 << 30, int)
        within("scales: context", self.context, 2, 1 << 20, int)
        within("scales: rate", self.rate, 0, 1)
        within("scales: zero_rate", self.zero_rate, 0, 1)

    def fit(
        self,
        torch: Any,
        original: Any,
        model: Any,
        linears: Mapping[str, Linear],
        gains: Sequence[str],
        windows: npt.NDArray[np.int64],
        *,
        masks: Callable[[Any], None] | None = None,
        progress: bool = True,
    ) -> Tuned:
        """Tune a model.

        Parameters
        ----------
        torch
            The library.
        original, model
            transformers' models in float32: the target, and the one whose linears are replaced.
        linears
            What stands in the place of the model's linears, by path.
        gains
            Names of the parameters that are tuned with them.
        windows
            Token ids ``[windows, context]``.
        masks
            Puts activation sparsity into `model`, whose linears are integers by then.
        progress
            Show a progress bar on stderr.

        Raises
        ------
        FormatError
            When the predictions are not finite.
        """
        modules = {name: trainable(torch, linear) for name, linear in linears.items()}
        for name, module in modules.items():
            path, _, leaf = name.rpartition(".")
            parent = model.get_submodule(path)
            module.bias = getattr(parent, leaf).bias
            setattr(parent, leaf, module)
        if masks is not None:
            masks(model)
        changes = {name: module.change for name, module in modules.items()}
        shifts = {
            name: module.shift for name, module in modules.items() if module.shift is not None
        }
        hooks = [scaled(torch, model, name, changes) for name in gains]
        groups = [{"params": list(changes.values()), "most": self.rate}]
        if shifts:
            groups.append({"params": list(shifts.values()), "most": self.zero_rate})
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        divergences: list[float] = []
        with tqdm(
            total=len(windows), desc="tune", unit="step", disable=not progress, dynamic_ncols=True
        ) as bar:
            for step, window in enumerate(windows):
                for group in optimizer.param_groups:
                    group["lr"] = group["most"] * _share(step, len(windows))
                ids = torch.from_numpy(window)[None]
                divergences.append(descend(torch, original, model, ids))
                if not math.isfinite(divergences[-1]):
                    message = f"tuning: step {step + 1}: the predictions are not finite"
                    raise FormatError(message)
                optimizer.step()
                optimizer.zero_grad()
                bar.set_postfix_str(f"divergence {np.mean(divergences[-8:]):.4f}")
                bar.update()
        for hook in hooks:
            hook()
        factors = {name: 1 + change.detach().numpy() for name, change in changes.items()}
        scales = {}
        for name, linear in linears.items():
            tuned = np.clip(linear.integers.scales * factors[name], 0, _SCALE_MAX)
            scales[name] = tuned.astype(np.float16).astype(np.float32)
        zeros = {
            name: shifted(torch.from_numpy(linears[name].integers.zeros), shift.detach()).numpy()
            for name, shift in shifts.items()
        }
        return Tuned(
            scales,
            zeros,
            {name: parameter(model, name).detach().numpy() * factors[name] for name in gains},
            divergences,
        )


def _share(step: int, steps: int) -> float:
    """Return the share of the greatest rate that a step has."""
    rising = min(1.0, (step + 1) / max(1.0, steps / 10))
    return rising * (0.5 + 0.5 * math.cos(math.pi * step / steps))
