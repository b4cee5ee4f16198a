"""Tuning of what is not an integer: scales and gains, by the original's predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nybble.errors import FormatError
from nybble.quant.base import Floats, IntWeights, Scheme, within

if TYPE_CHECKING:
    import torch

__all__ = ["Linear", "ScaleTuning", "Tuned"]

_ROWS = 128  # tokens whose predictions are in memory at a time
_SCALE_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Linear:
    """A rounded linear of the model that is tuned.

    Parameters
    ----------
    integers
        Its weights.
    scheme
        How its inputs are rounded while running.
    input_scale
        Their step, where it is found beforehand.
    """

    integers: IntWeights
    scheme: Scheme
    input_scale: float | None = None


@dataclass(frozen=True)
class Tuned:
    """What a tuning has found.

    Parameters
    ----------
    scales
        Scales by linear ``[rows, groups]``, exactly representable in float16.
    gains
        Gains of norms by tensor.
    divergences
        What each step found before it changed anything, in nats a token.
    """

    scales: dict[str, Floats]
    gains: dict[str, Floats]
    divergences: list[float]


@dataclass(frozen=True)
class ScaleTuning:
    """Scales and norm gains are trained until the predictions are the original's again.

    Paper: "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models",
    arXiv 2407.11062 (its second phase, end-to-end training of quantization parameters). That the
    original's predictions are the target is LLM-QAT's, arXiv 2305.17888; that norm gains are
    tuned as well is Norm Tweaking's, arXiv 2309.02784.

    Formula, for the integers ``q`` and the zero points ``z`` that a method has chosen and that
    stay as they are::

        w = s (1 + t) (q - z),   gain = g (1 + u),   minimise over t, u:  KL(p_original || p)

    Rounding of activations is done as while running, and taken for the identity by the gradient.

    Defaults: a pass over 32768 tokens, Adam at a rate of 0.001 that rises over the first tenth of
    the steps and falls to nothing by a cosine.

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
    """

    tokens: int = 32768
    context: int = 512
    rate: float = 1e-3

    def __post_init__(self) -> None:
        within("scales: tokens", self.tokens, 1, 1 << 30, int)
        within("scales: context", self.context, 2, 1 << 20, int)
        within("scales: rate", self.rate, 0, 1)

    def fit(
        self,
        torch: Any,
        original: Any,
        model: Any,
        linears: Mapping[str, Linear],
        gains: Sequence[str],
        windows: npt.NDArray[np.int64],
        *,
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
        progress
            Show a progress bar on stderr.

        Raises
        ------
        FormatError
            When the predictions are not finite.
        """
        modules = {name: _module(torch, linear) for name, linear in linears.items()}
        for name, module in modules.items():
            path, _, leaf = name.rpartition(".")
            parent = model.get_submodule(path)
            module.bias = getattr(parent, leaf).bias
            setattr(parent, leaf, module)
        changes = {name: module.change for name, module in modules.items()}
        hooks = [_scaled(torch, model, name, changes) for name in gains]
        optimizer = torch.optim.Adam(changes.values(), lr=self.rate, betas=(0.9, 0.95))
        divergences: list[float] = []
        with tqdm(
            total=len(windows), desc="tune", unit="step", disable=not progress, dynamic_ncols=True
        ) as bar:
            for step, window in enumerate(windows):
                for group in optimizer.param_groups:
                    group["lr"] = self.rate * _share(step, len(windows))
                ids = torch.from_numpy(window)[None]
                divergences.append(_descend(torch, original, model, ids))
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
        return Tuned(
            scales,
            {name: _parameter(model, name).detach().numpy() * factors[name] for name in gains},
            divergences,
        )


def _share(step: int, steps: int) -> float:
    """Return the share of the greatest rate that a step has."""
    rising = min(1.0, (step + 1) / max(1.0, steps / 10))
    return rising * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _parameter(model: Any, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path)._parameters[leaf]


def _scaled(torch: Any, model: Any, name: str, changes: dict[str, Any]) -> Any:
    """Let a module read a parameter times ``1 + u``; return how to undo that."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    stored = module._parameters[leaf]
    change = changes[name] = torch.zeros_like(stored).requires_grad_()

    def before(module: Any, _: Any) -> None:
        # The parameter's place in the module's dictionary takes a result of operations, too.
        module._parameters[leaf] = stored * (1 + change)

    def after() -> None:
        hook.remove()
        module._parameters[leaf] = stored

    hook = module.register_forward_pre_hook(before)
    return after


def _module(torch: Any, linear: Linear) -> Any:
    """Return a module that computes with integers as the run time does, up to float rounding."""
    integers, scheme = linear.integers, linear.scheme
    codes = torch.from_numpy(np.ascontiguousarray(integers.codes))
    scales = torch.from_numpy(np.ascontiguousarray(integers.scales))
    rows, groups = integers.scales.shape
    middle = np.full((rows, groups), 2.0 ** (integers.bits - 1), dtype=np.float32)
    zeros = torch.from_numpy(middle if integers.zeros is None else integers.zeros)

    def centred() -> Any:
        values = codes.reshape(rows, groups, -1).to(torch.float32)
        values -= zeros[:, :, None]
        return values

    def rounded(x: Any) -> Any:
        if scheme.activations == 16:
            return x
        top = 2 ** (scheme.activations - 1) - 1
        if scheme.static:
            assert linear.input_scale is not None  # it was found with the integers
            return (x / linear.input_scale).round().clamp(-top, top) * linear.input_scale
        parts = scheme.groups(x.shape[-1]) if scheme.strategy == "group" else 1
        grouped = x.reshape(*x.shape[:-1], parts, -1)
        steps = grouped.abs().amax(dim=-1, keepdim=True) / top
        steps = torch.where(steps > 0, steps, torch.ones_like(steps))
        return ((grouped / steps).round() * steps).reshape(x.shape)

    class Product(torch.autograd.Function):  # type: ignore[misc]
        """Keeps the inputs alone: weights are made of the integers again on the way back."""

        @staticmethod
        def forward(ctx: Any, x: Any, change: Any) -> Any:
            x = rounded(x)
            ctx.save_for_backward(x, change)
            weight = centred().mul_((scales * (1 + change))[:, :, None]).reshape(rows, -1)
            return x @ weight.T

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            x, change = ctx.saved_tensors
            of_weight = gradient.reshape(-1, rows).T @ x.reshape(-1, x.shape[-1])
            values = centred()
            of_change = (of_weight.reshape(rows, groups, -1) * values).sum(dim=-1) * scales
            weight = values.mul_((scales * (1 + change))[:, :, None]).reshape(rows, -1)
            return gradient @ weight, of_change

    class Module(torch.nn.Module):  # type: ignore[misc]
        """A linear of integers."""

        def __init__(self) -> None:
            super().__init__()
            self.bias = None
            self.change = torch.zeros_like(scales).requires_grad_()

        def forward(self, x: Any) -> Any:
            product = Product.apply(x, self.change)
            return product if self.bias is None else product + self.bias

    return Module()


def _descend(torch: Any, original: Any, model: Any, ids: torch.Tensor) -> float:
    """Add a window's gradients; return the mean divergence of its predictions.

    The gradient of the outputs ``W h`` of a head is known, ``p - p_original``; with it the head
    takes a few tokens at a time, where all predictions at once would be much of the memory.
    """
    with torch.no_grad():
        wanted = original.base_model(ids, use_cache=False).last_hidden_state[0]
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[0]
    total, gradient = 0.0, torch.empty_like(hidden)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        for rows in range(0, len(hidden), _ROWS):
            part = slice(rows, rows + _ROWS)
            target = (wanted[part] @ head.T).log_softmax(dim=-1)
            found = (hidden[part] @ head.T).log_softmax(dim=-1)
            likely = target.exp()
            total += float((likely * (target - found)).sum())
            gradient[part] = (found.exp_() - likely) @ head / len(hidden)
    hidden.backward(gradient)
    return total / len(hidden)
