"""PERP: few parameters trained after pruning bring most of the loss back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nybble.errors import ArgumentError, FormatError
from nybble.prune.base import number, one_of
from nybble.prune.recovery import Floats, Patient, Recovery
from nybble.registry import unknown

if TYPE_CHECKING:
    import torch

__all__ = ["Perp", "insert", "merge"]

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Perp(Recovery):
    """Biases, norms and low-rank changes of the weights that are left are trained; zeros stay.

    Paper: "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", arXiv 2312.15230.

    Formula, with the mask ``M`` of a weight ``W`` and ``B`` 0 at first::

        MaskLoRA:   W + alpha / rank * M * (B A)
        ScaleLoRA:  W * (B A),  with all of A and B 1 / sqrt(rank) at first

    Both merge into ``W`` with not one zero lost and nothing changed in what the model computes.

    Defaults: ``rank`` 16, ``alpha`` 32, a warm-up of a tenth and a linear decay, as in the paper;
    ``rate`` 0.001 is ours, and so is a pass over 32768 tokens, a window a step.

    What differs here: masks are those of the plan, not ``W != 0``, since a weight that stays may be
    zero; where whole units went there is no mask, and all weights that are left may change. The
    whole model is in memory in float32. :meth:`run` takes any loss of any module, so that of one
    layer's outputs, too, as in the paper's reconstruction.

    Parameters
    ----------
    tokens, context
        See :class:`nybble.prune.recovery.Recovery`.
    adapters
        ``mask`` or ``scale`` for the two forms, ``none`` for biases and norms alone.
    biases, norms
        Whether those are trained.
    rank, alpha
        The adapters'.
    rate
        Largest step of the optimizer (AdamW without decay).
    warmup
        Share of the steps in which the rate rises.
    """

    adapters: str = "mask"
    biases: bool = True
    norms: bool = True
    rank: int = 16
    alpha: float = 32.0
    rate: float = 1e-3
    warmup: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("adapters", self.adapters, ("mask", "scale", "none"))
        for name in ("biases", "norms"):
            one_of(name, getattr(self, name), (True, False))
        number("rank", self.rank, 1, 1 << 16, whole=True)
        number("alpha", self.alpha, 0, 1e6)
        number("rate", self.rate, 0, 10)
        number("warmup", self.warmup, 0, 1)

    def recover(
        self, patient: Patient, windows: npt.NDArray[np.int64], *, progress: bool = True
    ) -> dict[str, Floats]:
        """See :meth:`nybble.prune.recovery.Recovery.recover`; a window is a step."""
        import torch

        def loss(model: torch.nn.Module, window: npt.NDArray[np.int64]) -> torch.Tensor:
            ids = torch.from_numpy(window)[None]
            logits = model(ids, use_cache=False).logits[0, :-1]
            found: torch.Tensor = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
            return found

        model = patient.pruned.walk().whole()
        shown = tqdm(windows, "recover", unit="step", disable=not progress, dynamic_ncols=True)
        stays = patient.stays() if self.adapters != "none" else {}
        self.run(model, stays, shown, loss, len(windows))
        trained = {name for name, _ in self._small(model)} | set(stays)
        state = dict(model.named_parameters())
        return {name: state[name].data.numpy() for name in patient.pruned.shapes if name in trained}

    def run(
        self,
        model: torch.nn.Module,
        masks: Mapping[str, Bools],
        batches: Iterable[Any],
        loss: Callable[[torch.nn.Module, Any], torch.Tensor],
        steps: int,
    ) -> list[float]:
        """Train in place; return the losses.

        Parameters
        ----------
        model
            A pruned model, with zeros where the masks say so.
        masks
            Which weights stay, by the parameters' names; those of linears.
        batches
            At least `steps` of whatever `loss` takes.
        loss
            What is made smaller.
        steps
            How many steps.

        Raises
        ------
        ArgumentError
            When a mask names no linear's weight, there are too few batches, or nothing to train.
        FormatError
            When the loss is not finite; the model is then as it was merged so far.
        """
        import torch

        number("steps", steps, 1, 1 << 40, whole=True)
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        losses: list[float] = []
        try:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            if self.adapters != "none":
                insert(model, masks, self.adapters, self.rank, self.alpha)
            trained = self._trained(model)
            if not trained:
                message = "model: expected biases, norms or adapters to train, found none"
                raise ArgumentError(message)
            optimizer = torch.optim.AdamW(trained, lr=self.rate, weight_decay=0.0)
            for batch in batches:
                for group in optimizer.param_groups:
                    group["lr"] = self.rate * self._height(len(losses), steps)
                optimizer.zero_grad(set_to_none=True)
                value = loss(model, batch)
                losses.append(float(value.detach()))
                if not np.isfinite(losses[-1]):
                    message = f"recovery: expected a finite loss, found {losses[-1]}"
                    raise FormatError(message)
                value.backward()
                optimizer.step()
                if len(losses) == steps:
                    break
        finally:
            merge(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(before[name])
                parameter.grad = None
        if len(losses) < steps:
            message = f"batches: expected {steps}, found {len(losses)}"
            raise ArgumentError(message)
        return losses

    def _height(self, step: int, steps: int) -> float:
        warm = self.warmup * steps
        if step < warm:
            return (step + 1) / (warm + 1)
        return (steps - step) / max(steps - warm, 1)

    def _trained(self, model: torch.nn.Module) -> list[torch.nn.Parameter]:
        """Return what is to be trained."""
        found = [p for p in model.parameters() if p.requires_grad]  # the adapters'
        for _, parameter in self._small(model):
            parameter.requires_grad_(True)
            found.append(parameter)
        return found

    def _small(self, model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Give the norms and biases that are trained, with their names."""
        for path, module in model.named_modules():
            norm = "norm" in type(module).__name__.lower()
            for name, parameter in module.named_parameters(recurse=False):
                if (self.norms and norm) or (self.biases and name == "bias"):
                    yield f"{path}.{name}" if path else name, parameter


def insert(
    model: torch.nn.Module, masks: Mapping[str, Bools], kind: str, rank: int, alpha: float
) -> None:
    """Put an adapter over each masked weight; what the model computes does not change.

    Raises
    ------
    ArgumentError
        When a mask names no linear's weight, or is of another shape.
    """
    import torch
    from torch.nn.utils import parametrize

    linears = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's
    }
    for name, mask in masks.items():
        if name not in linears:
            raise ArgumentError(unknown("linear's weight", name, linears))
        if tuple(linears[name].weight.shape) != mask.shape:
            message = f"{name}: expected a mask of shape {list(linears[name].weight.shape)}, "
            message += f"found {list(mask.shape)}"
            raise ArgumentError(message)
    for name, mask in masks.items():
        adapter = _adapter(torch, torch.from_numpy(mask), kind, rank, alpha)
        parametrize.register_parametrization(linears[name], "weight", adapter)


def merge(model: torch.nn.Module) -> None:
    """Make adapters part of the weights, and remove them."""
    from torch.nn.utils import parametrize

    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def _adapter(torch: Any, mask: torch.Tensor, kind: str, rank: int, alpha: float) -> Any:
    rows, cols = mask.shape

    class Adapter(torch.nn.Module):  # type: ignore[misc]
        """A change of a weight by a matrix of low rank, nowhere but where the mask allows."""

        def __init__(self) -> None:
            super().__init__()
            if kind == "scale":
                a = torch.full((rank, cols), rank**-0.5)
                b = torch.full((rows, rank), rank**-0.5)
            else:
                draw = torch.Generator().manual_seed(0)
                a = torch.randn(rank, cols, generator=draw) / cols**0.5
                b = torch.zeros(rows, rank)
            self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)
            self.register_buffer("mask", mask)

        def forward(self, weight: Any) -> Any:
            change = self.b @ self.a
            if kind == "scale":
                return weight * change
            return weight + alpha / rank * torch.where(self.mask, change, 0.0)

    return Adapter()
