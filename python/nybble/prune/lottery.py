"""Lottery tickets: train, take the smallest weights out, go back to the start, again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nybble import _nybble
from nybble.errors import ArgumentError, FormatError
from nybble.prune.base import number, one_of
from nybble.prune.schedule import rounds

if TYPE_CHECKING:
    import torch

__all__ = ["LotteryTickets", "Ticket"]

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Ticket:
    """What a search has found; the model holds its trained weights.

    Parameters
    ----------
    masks
        Which weights stay, by the parameters' names.
    density
        Share of them that does.
    start
        The weights that the last training started from, by name.
    """

    masks: Mapping[str, Bools]
    density: float
    start: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LotteryTickets:
    """Iterative magnitude pruning of a small network, with weights that go back to an early step.

    Papers: "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", arXiv
    1803.03635; with ``rewind`` above 0, "Stabilizing the Lottery Ticket Hypothesis", arXiv
    1903.01611.

    Formula, with the weights ``w_k`` after ``k`` steps and masks ``m``, in each round::

        train from m w_k to m w_T;  of the weights left, a share with the smallest |w_T| goes

    Defaults: a fifth of the weights a round, layer by layer, and ``rewind`` 0, as in the first
    paper for LeNet; the second one goes back to 0.1 to 7 % of the training and ranks all layers
    together.

    What differs here: the last layer loses as much as the others, where the first paper takes half;
    vectors (biases, norms) stay whole.

    Parameters
    ----------
    share
        Share of the weights left that goes in each round.
    rounds
        How many.
    rewind
        The step whose weights each training starts from.
    scope
        ``layer`` or ``global``: among which weights the smallest are found.
    """

    share: float = 0.2
    rounds: int = 10
    rewind: int = 0
    scope: str = "layer"

    def __post_init__(self) -> None:
        number("share", self.share, 0, 0.99)
        number("rounds", self.rounds, 0, 1000, whole=True)
        number("rewind", self.rewind, 0, 1 << 40, whole=True)
        one_of("scope", self.scope, ("layer", "global"))

    def run(
        self,
        model: torch.nn.Module,
        trainer: Callable[[torch.nn.Module], Callable[[int], object]],
        steps: int,
    ) -> Ticket:
        """Search.

        Parameters
        ----------
        model
            The network with the weights it begins with, which is trained in place, on the CPU.
        trainer
            Called at the start of each training with the model; what it returns is called with the
            number of each step and changes the weights by one.
        steps
            Steps of one training.

        Raises
        ------
        ArgumentError
            When there is nothing to prune, or the step to go back to is behind the last.
        FormatError
            When training leaves weights that are not finite.
        """
        import torch

        weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
        if not weights:
            message = "model: expected a parameter of two or more dimensions, found none"
            raise ArgumentError(message)
        masks = {n: np.ones(tuple(p.shape), dtype=bool) for n, p in weights.items()}
        early: dict[str, Any] = {}
        done = 0
        with torch.no_grad():
            for event in rounds(self.share, self.rounds, steps, self.rewind):
                if event.action == "train":
                    step = trainer(model)
                    for index in range(done, event.step):
                        if index == self.rewind and not early:
                            early = {n: v.clone() for n, v in model.state_dict().items()}
                        with torch.enable_grad():
                            step(index)
                        _apply(torch, weights, masks)
                    done = event.step
                elif event.action == "prune":
                    self._prune(weights, masks, event.target)
                else:
                    model.load_state_dict(early)
                    _apply(torch, weights, masks)
                    done = event.step
        kept = sum(int(mask.sum()) for mask in masks.values())
        return Ticket(masks, kept / sum(mask.size for mask in masks.values()), early)

    def _prune(
        self, weights: Mapping[str, torch.Tensor], masks: dict[str, Bools], target: float
    ) -> None:
        """Take out the smallest, up to a share of all; what is out already comes first."""
        scores = {}
        for name, weight in weights.items():
            values = np.abs(weight.detach().numpy()).astype(np.float32)
            if not np.isfinite(values).all():
                message = f"{name}: expected finite weights after training, found others"
                raise FormatError(message)
            scores[name] = np.where(masks[name], values, np.float32(-1)).reshape(1, -1)
        names = [[name] for name in weights] if self.scope == "layer" else [list(weights)]
        for together in names:
            joined = np.concatenate([scores[name] for name in together], axis=1)
            keep = _nybble.select(joined, int(target * joined.size), "row").view(np.bool_)[0]
            edges = np.cumsum([0, *(scores[name].size for name in together)])
            for place, name in enumerate(together):
                part = keep[edges[place] : edges[place + 1]]
                masks[name] = part.reshape(masks[name].shape).copy()


def _apply(torch: Any, weights: Mapping[str, torch.Tensor], masks: Mapping[str, Bools]) -> None:
    for name, weight in weights.items():
        weight.mul_(torch.from_numpy(masks[name]))
