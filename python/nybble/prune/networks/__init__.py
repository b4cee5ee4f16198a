"""Pruning of torch modules of any kind: their channels are found by tracing them.

:func:`trace` finds what can go, the criteria and allocators of :mod:`nybble.prune` decide what
does, and :func:`cut` makes the smaller module; :func:`prune_network` does all three. This needs
torch, and nothing else in :mod:`nybble.prune` imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nybble.errors import ArgumentError, FormatError, UnsupportedError
from nybble.prune.allocate import Allocator, Kept, Limits, Uniform, meet
from nybble.prune.base import Criterion, number
from nybble.prune.evidence import Evidence
from nybble.prune.graph import CHANNEL, UnitGraph
from nybble.prune.magnitude_units import Magnitude
from nybble.prune.networks.surgery import cut
from nybble.prune.networks.trace import evaluated, trace
from nybble.prune.plan import Plan, apply_masks

__all__ = ["PrunedNetwork", "cut", "observe", "prune_network", "trace"]

Loss = Callable[[torch.nn.Module, Any], "torch.Tensor"]

_GRADIENTS = frozenset({"gradient", "fisher"})


@dataclass(frozen=True)
class PrunedNetwork:
    """A network and what was taken out of it.

    Parameters
    ----------
    module
        The smaller network.
    graph
        The units of the one before.
    plan
        Which of them stayed.
    removed
        Share of the parameters that is gone.
    """

    module: Any
    graph: UnitGraph
    plan: Plan
    removed: float


def prune_network(
    module: torch.nn.Module,
    inputs: Any,
    ratio: float,
    *,
    criterion: Criterion | None = None,
    allocator: Allocator | None = None,
    round_to: int = 1,
    floor: float = 0.1,
    loss: Loss | None = None,
    batches: Iterable[Any] = (),
) -> PrunedNetwork:
    """Remove channels of a network.

    Parameters
    ----------
    module
        The network, which stays as it is.
    inputs
        An example of what it is called with, a tuple if that is more than one value.
    ratio
        Share of its parameters to remove.
    criterion
        What channels are worth; by default their magnitude
        (:class:`nybble.prune.magnitude_units.Magnitude`). Others that fit are
        :class:`~nybble.prune.random_units.Chance` and, with `loss` and `batches`,
        :class:`~nybble.prune.llm_pruner.Taylor`.
    allocator
        What spreads the budget, by default :class:`~nybble.prune.allocate.Uniform`. For
        :class:`~nybble.prune.allocate.Global` a criterion should be
        :class:`~nybble.prune.normalised.Normalised`.
    round_to
        Channels that stay are a multiple of it, or all.
    floor
        Share of its channels that each group keeps at least.
    loss
        Given the network and a batch, returns the loss, for criteria that look at gradients.
    batches
        What it is given.

    Raises
    ------
    ArgumentError
        When the ratio would empty a layer, or nothing in the network can go.
    FormatError
        When scores or the loss are not finite.
    UnsupportedError
        When the network cannot be traced, or cut it would be another function.
    """
    number("ratio", ratio, 0, 0.99)
    example = tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,)
    criterion, allocator = criterion or Magnitude(), allocator or Uniform()
    graph = trace(module, *example)
    if not graph.groups:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(graph.whole.items())[:3])
        message = f"{type(module).__name__}: expected channels that can go, found none ({reasons})"
        raise ArgumentError(message)
    groups = graph.of(CHANNEL)
    evidence = observe(module, criterion.needs | allocator.needs, loss, batches)
    scores = criterion.scores(groups, evidence)
    limits = Limits({CHANNEL: round_to}, floor)
    total = graph.parameters()

    def keep(share: float) -> Kept:
        return allocator.keep(groups, scores, share, limits, evidence)

    def removed(kept: Kept) -> float:
        return 1 - graph.parameters_left(kept) / total

    kept = meet(ratio, limits.removable(groups), keep, removed)
    settings = {"criterion": repr(criterion), "allocator": repr(allocator), "ratio": ratio}
    plan = Plan(graph.digest, kept, provenance=settings)
    return PrunedNetwork(_checked(module, graph, plan, example), graph, plan, removed(kept))


def observe(
    module: torch.nn.Module,
    needs: Iterable[str],
    loss: Loss | None = None,
    batches: Iterable[Any] = (),
) -> Evidence:
    """Measure what criteria need of a network.

    Parameters
    ----------
    module
        The network.
    needs
        ``gradient`` and ``fisher`` of :data:`nybble.prune.evidence.NEEDS`, a batch being a window.
    loss, batches
        As of :func:`prune_network`.

    Raises
    ------
    ArgumentError
        When something else is needed, or there is no loss or no batch.
    FormatError
        When the loss is not finite.
    """
    tensors = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    found = Evidence(lambda name: tensors[name].detach().numpy())
    wanted = frozenset(needs)
    if not wanted:
        return found
    if other := wanted - _GRADIENTS:
        message = f"criterion: it needs {', '.join(sorted(other))}, which is measured in "
        message += "transformers alone"
        raise ArgumentError(message)
    parameters = dict(module.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    count = 0
    with evaluated(module):
        for batch in batches:
            if loss is None:
                break
            value = loss(module, batch)
            if not bool(torch.isfinite(value)):
                message = f"loss: expected a finite number, found {float(value.detach())}"
                raise FormatError(message)
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient
                    squares[name].addcmul_(gradient, gradient)
            count += 1
    if not count:
        message = f"criterion: it needs {', '.join(sorted(wanted))}: give a loss and batches"
        raise ArgumentError(message)
    found.gradient = {name: (total / count).numpy() for name, total in sums.items()}
    found.fisher = {name: total.numpy() for name, total in squares.items()}
    return found


def _checked(
    module: torch.nn.Module, graph: UnitGraph, plan: Plan, example: tuple[Any, ...]
) -> Any:
    """Cut; make sure that the result is the masked network's on the example."""
    import copy

    small, masked = cut(module, graph, plan), copy.deepcopy(module)
    apply_masks(masked, graph, plan)
    with evaluated(small), evaluated(masked), torch.no_grad():
        wanted = _tensors(masked(*example))
        try:
            found = _tensors(small(*example))
        except (RuntimeError, ValueError, IndexError) as error:
            message = f"{type(module).__name__}: its code depends on sizes that were cut: {error}"
            raise UnsupportedError(message) from error
    for one, other in zip(found, wanted, strict=True):
        scale = max(float(other.abs().max()), 1e-6) if other.numel() else 1.0
        if one.shape != other.shape or not np.isclose(
            float((one.double() - other.double()).abs().max()) / scale, 0, atol=1e-4
        ):
            message = f"{type(module).__name__}: cut, it gives other outputs than masked: its code "
            message += "depends on the number of channels"
            raise UnsupportedError(message)
    return small


def _tensors(outputs: Any) -> list[Any]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, (list, tuple)):
        return [tensor for output in outputs for tensor in _tensors(output)]
    return []
