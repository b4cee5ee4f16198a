"""Linears of integers, and gains, that can be trained: what tunings are made of.

The integers stay; what is trained is a relative change of each scale and of each gain, and a shift
of each zero point that need not be whole. A product's gradient is that of the floats the integers
stand for. Rounding, of zero points to sixteenths and of activations as the run time does it, has
the gradient of the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nybble.quant.base import IntWeights, Scheme

if TYPE_CHECKING:
    import torch

__all__ = ["Linear", "descend", "parameter", "scaled", "shifted", "trainable"]

_ROWS = 128  # tokens whose predictions are in memory at a time


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


def parameter(model: Any, name: str) -> Any:
    """Return a parameter of a model by its name."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path)._parameters[leaf]


def scaled(torch: Any, model: Any, name: str, changes: dict[str, Any]) -> Callable[[], None]:
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


def shifted(zeros: Any, shift: Any) -> Any:
    """Return zero points of 4-bit codes, moved and rounded to what the files can hold."""
    return ((zeros + shift) * 16).round().clamp(0, 255) / 16


def trainable(torch: Any, linear: Linear) -> Any:
    """Return a module that computes with integers as the run time does, up to float rounding."""
    integers, scheme = linear.integers, linear.scheme
    codes = torch.from_numpy(np.ascontiguousarray(integers.codes))
    scales = torch.from_numpy(np.ascontiguousarray(integers.scales))
    rows, groups = integers.scales.shape
    middle = np.full((rows, groups), 2.0 ** (integers.bits - 1), dtype=np.float32)
    zeros = torch.from_numpy(middle if integers.zeros is None else integers.zeros)

    def centred(shift: Any) -> Any:
        values = codes.reshape(rows, groups, -1).to(torch.float32)
        values -= (zeros if shift is None else shifted(zeros, shift))[:, :, None]
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
        def forward(ctx: Any, x: Any, change: Any, shift: Any) -> Any:
            x = rounded(x)
            ctx.save_for_backward(x, change, shift)
            weight = centred(shift).mul_((scales * (1 + change))[:, :, None]).reshape(rows, -1)
            return x @ weight.T

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            x, change, shift = ctx.saved_tensors
            of_weight = gradient.reshape(-1, rows).T @ x.reshape(-1, x.shape[-1])
            of_weight = of_weight.reshape(rows, groups, -1)
            values, steps = centred(shift), scales * (1 + change)
            of_change = (of_weight * values).sum(dim=-1) * scales
            of_shift = None if shift is None else -of_weight.sum(dim=-1) * steps
            weight = values.mul_(steps[:, :, None]).reshape(rows, -1)
            return gradient @ weight, of_change, of_shift

    class Module(torch.nn.Module):  # type: ignore[misc]
        """A linear of integers."""

        def __init__(self) -> None:
            super().__init__()
            self.bias = None
            self.change = torch.zeros_like(scales).requires_grad_()
            fractions = scheme.zeros == "sixteenths"
            self.shift = torch.zeros_like(scales).requires_grad_() if fractions else None

        def forward(self, x: Any) -> Any:
            product = Product.apply(x, self.change, self.shift)
            return product if self.bias is None else product + self.bias

    return Module()


def descend(torch: Any, original: Any, model: Any, ids: torch.Tensor) -> float:
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
