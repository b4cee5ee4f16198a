"""Each layer that is left is trained to give what the original's gave there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nybble.calibrate.layers import Walk
from nybble.errors import FormatError
from nybble.prune.base import number
from nybble.prune.recovery import Floats, Patient, Recovery

if TYPE_CHECKING:
    import torch

__all__ = ["Reconstruction"]


@dataclass(frozen=True)
class Reconstruction(Recovery):
    """Layer by layer, weights that are left take some steps towards the original layer's outputs.

    Paper: "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", arXiv 2312.15230, its
    second mode; the least squares fit that :class:`nybble.prune.compensate.LeastSquares` has in
    closed form for one linear, for a whole layer.

    Formula, for the states ``h`` that enter layer ``l`` of the original and ``s`` that enter the
    pruned one, behind its layers that are done::

        minimise over the weights that stay:  ||f_l'(s) - f_l(h)||^2 / ||f_l(h)||^2

    Where layers were dropped, the one before them is brought to what entered the next that stays;
    where the residual stream is narrower, to the channels that are left.

    Defaults: ours. One layer of each model is in memory, and the text's states for both.

    What differs here: all weights that stay are trained, and norms and biases, where the paper
    trains masked adapters: with one layer at a time there is memory for it.

    Parameters
    ----------
    tokens, context
        See :class:`nybble.prune.recovery.Recovery`.
    rate
        Largest step of Adam, which falls to nothing linearly.
    passes
        How many times each layer sees the text; a window is a step.
    """

    rate: float = 1e-4
    passes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        number("recovery.rate", self.rate, 0, 10)
        number("recovery.passes", self.passes, 1, 1000, whole=True)

    def recover(
        self, patient: Patient, windows: npt.NDArray[np.int64], *, progress: bool = True
    ) -> dict[str, Floats]:
        """See :meth:`nybble.prune.recovery.Recovery.recover`."""
        import torch

        pruned, original = patient.pruned.walk(), patient.original.walk()
        states, wanted = _recordable(pruned.embed(windows)), original.embed(windows)
        stays = patient.stays()
        done: dict[str, Floats] = {}
        reached = 0
        ends = [*patient.layers[1:], len(original)]
        for index, end in enumerate(
            tqdm(ends, "reconstruct", unit="layer", disable=not progress, dynamic_ncols=True)
        ):
            for number_ in range(reached, end):
                original.layer(number_).outputs(wanted)
                original.drop(number_)
            reached = end
            done.update(self._layer(torch, pruned, index, states, wanted, patient.hidden, stays))
        return done

    def _layer(
        self,
        torch: Any,
        walk: Walk,
        index: int,
        states: list[torch.Tensor],
        wanted: list[torch.Tensor],
        hidden: npt.NDArray[np.int64] | None,
        stays: dict[str, npt.NDArray[np.bool_]],
    ) -> dict[str, Floats]:
        """Train a layer, run it, and return its tensors."""
        layer = walk.layer(index)
        named = layer.parameters
        masks = {name: torch.from_numpy(stays[name]) for name in named if name in stays}
        optimizer = torch.optim.Adam(
            [parameter.requires_grad_(True) for parameter in named.values()], lr=self.rate
        )
        steps = self.passes * len(states)
        for step in range(steps):
            place = step % len(states)
            target = wanted[place] if hidden is None else wanted[place][..., hidden]
            for group in optimizer.param_groups:
                group["lr"] = self.rate * (1 - step / steps)
            optimizer.zero_grad()
            off = torch.square(layer.run(states[place]) - target).sum()
            loss = off / torch.square(target).sum().clamp(min=1e-30)
            if not bool(torch.isfinite(loss)):
                message = f"recovery: {layer.prefix}: expected a finite loss, "
                message += f"found {float(loss.detach())}"
                raise FormatError(message)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    named[name].mul_(mask)
        with torch.no_grad():
            for place, state in enumerate(states):
                states[place] = layer.run(state)
        found = {name: parameter.detach().numpy().copy() for name, parameter in named.items()}
        walk.drop(index)
        return found


def _recordable(states: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors that gradients can be recorded for, which those of inference cannot."""
    return [state.clone() for state in states]
