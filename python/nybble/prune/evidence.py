"""What criteria look at: weights, and what calibration has seen of them.

One collector serves all: :class:`Lens` holds the model and the text or the images, and
:meth:`Lens.evidence` measures what is asked for. Activations are read layer by layer
(:mod:`nybble.calibrate`), with one layer in memory; gradients, which need all layers, are taken on
the whole model in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nybble.calibrate.layers import Reader, Walk
from nybble.calibrate.stats import InputStats
from nybble.errors import ArgumentError, FormatError
from nybble.prune.graph import Keep, Slice, UnitGraph
from nybble.prune.plan import Plan, apply_masks
from nybble.registry import unknown

if TYPE_CHECKING:
    import torch

__all__ = ["GRADIENTS", "NEEDS", "Evidence", "Lens", "Subject", "per_unit"]

NEEDS = {
    "moments": "the means and variances of the inputs of the linears that end blocks",
    "blocks": "how far each layer turns what passes through it",
    "gradient": "the gradient of the loss over all text",
    "fisher": "the sum of the squared gradients of single windows",
}
"""What a criterion may need besides the weights."""

GRADIENTS = frozenset({"gradient", "fisher"})
"""Those of them that are of a loss on text."""

_ENDS = (1, 3)  # the stages of the linears that end attention and the feed-forward block

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass
class Evidence:
    """What was seen of a model.

    Parameters
    ----------
    weight
        Reads a tensor by name, as it is stored.
    inputs
        Statistics of what linears read, by the linears' paths.
    gradient
        Gradients of the mean loss, by tensor.
    fisher
        Sums over windows of the squared gradient of each one's mean loss, by tensor.
    angles, cosines
        For each layer, means over tokens of the angle between what enters and what leaves it, in
        half turns, and of its cosine.
    """

    weight: Callable[[str], Floats]
    inputs: Mapping[str, InputStats] = field(default_factory=dict)
    gradient: Mapping[str, Floats] = field(default_factory=dict)
    fisher: Mapping[str, Floats] = field(default_factory=dict)
    angles: Doubles = field(default_factory=lambda: np.zeros(0))
    cosines: Doubles = field(default_factory=lambda: np.zeros(0))


def per_unit(part: Slice, values: npt.NDArray[Any], size: int) -> Doubles:
    """Return the sums over each of `size` units of values of all indices of a slice's axis."""
    of = np.asarray(part.units)
    mine = of >= 0
    sums = np.bincount(of[mine], np.asarray(values[: len(of)])[mine], minlength=size)
    return np.asarray(sums, dtype=np.float64)


@dataclass(frozen=True)
class Subject:
    """A model that can be walked through any number of times.

    Parameters
    ----------
    config
        Its configuration.
    parts
        What it consists of (:meth:`nybble._nybble.Checkpoint.plan`).
    shapes
        Shapes of its tensors.
    read
        Reads a tensor's rows.
    threads
        Threads to use.
    """

    config: dict[str, Any]
    parts: dict[str, Any]
    shapes: Mapping[str, Sequence[int]]
    read: Reader
    threads: int | None = None

    def walk(self) -> Walk:
        """Begin to walk through it."""
        return Walk(self.config, self.parts, dict(self.shapes), self.read, self.threads)

    def weight(self, name: str) -> Floats:
        """Return a whole tensor."""
        return self.read(name, 0, None).reshape(tuple(self.shapes[name]))


class Lens:
    """Looks at a model while it reads a text, or at an image encoder while it sees images.

    Parameters
    ----------
    subject
        The model.
    graph
        Its units.
    windows
        Token ids ``[windows, context]``, or images (:meth:`nybble.calibrate.layers.Walk.embed`), or
        nothing for criteria that look at weights alone.
    seed
        For criteria that draw.
    """

    def __init__(
        self,
        subject: Subject,
        graph: UnitGraph,
        windows: npt.NDArray[Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.subject = subject
        self.graph = graph
        self.windows = windows
        self.seed = seed
        self._whole: Any = None

    def evidence(self, needs: Collection[str], keep: Keep | None = None) -> Evidence:
        """Measure.

        Parameters
        ----------
        needs
            Names in :data:`NEEDS`.
        keep
            Units that are left, where others were removed already: the model is then measured with
            the others masked. Units do not come back from one call to the next.

        Raises
        ------
        ArgumentError
            When a need is not known, or there is nothing to look at.
        FormatError
            When activations or gradients are not finite.
        """
        for need in needs:
            if need not in NEEDS:
                raise ArgumentError(unknown("evidence", need, NEEDS))
        found = Evidence(self.subject.weight)
        if not needs:
            return found
        if self.windows is None or not self.windows.size:
            message = (
                f"calibration: expected text or images, found none: {', '.join(sorted(needs))} "
            )
            message += "must be measured"
            raise ArgumentError(message)
        if GRADIENTS & set(needs) or keep is not None:
            self._gradients(found, needs, keep)
        if "moments" in needs or ("blocks" in needs and not found.angles.size):
            self._activations(found, needs)
        return found

    def release(self) -> None:
        """Give the whole model's memory back."""
        self._whole = None

    def _activations(self, found: Evidence, needs: Collection[str]) -> None:
        assert self.windows is not None
        walk = self.subject.walk()
        hidden = walk.embed(self.windows)
        inputs: dict[str, InputStats] = {}
        angles, cosines = np.zeros(len(walk)), np.zeros(len(walk))
        wanted = {"moments"} & set(needs)
        for index in range(len(walk)):
            layer = walk.layer(index)
            names = [layer.stages[stage][0] for stage in _ENDS]
            stats = [InputStats(n, layer.weight(n).shape[1], wanted) for n in names]
            for window, read, output in layer.trace(hidden):
                for stage, of in zip(_ENDS, stats, strict=True):
                    of.update(read[stage])
                turn = _turn(walk.torch, hidden[window], output, walk.prefixes[index])
                angles[index] += turn[0] / len(hidden)
                cosines[index] += turn[1] / len(hidden)
                hidden[window] = output
            inputs.update(zip(names, stats, strict=True))
            walk.drop(index)
        found.inputs, found.angles, found.cosines = inputs, angles, cosines

    def _gradients(self, found: Evidence, needs: Collection[str], keep: Keep | None) -> None:
        """Measure on the whole model, with what is not kept masked."""
        assert self.windows is not None
        if self._whole is None:
            self._whole = self.subject.walk().whole()
        model = self._whole
        import torch

        if keep is not None:
            apply_masks(model, self.graph, Plan(self.graph.digest, _arrays(keep)))
            state = dict(model.named_parameters())
            found.weight = lambda name: state[name].data.numpy()
        linears = [entry["module"] for entry in self.subject.parts["linears"]]
        names = {f"{linear}.weight" for linear in linears if not linear.startswith("lm_head")}
        names |= {f"{linear}.bias" for linear in linears}
        names |= {part.tensor for group in self.graph.groups.values() for part in group.slices}
        wanted = [(name, p) for name, p in model.named_parameters() if name in names]
        for _, parameter in wanted:
            parameter.requires_grad_(True)
            parameter.grad = None
        prefixes = [layer.prefix for layer in self.graph.layers]
        turns: dict[int, list[tuple[float, float]]] = {i: [] for i in range(len(prefixes))}
        hooks = []
        if "blocks" in needs:
            for index, prefix in enumerate(prefixes):
                module = model.get_submodule(prefix)
                hooks.append(module.register_forward_hook(_watch(torch, turns[index], prefix)))
        backward = GRADIENTS & set(needs)
        fisher: dict[str, Any] = {}
        if "fisher" in needs:
            fisher = {name: torch.zeros_like(parameter) for name, parameter in wanted}
        total = {n: torch.zeros_like(p) for n, p in wanted} if len(backward) == 2 else {}
        try:
            for window in self.windows:
                self._backward(torch, model, window, learn=bool(backward))
                for name, parameter in wanted if fisher else ():
                    fisher[name].addcmul_(parameter.grad, parameter.grad)
                    if total:
                        total[name].add_(parameter.grad)
                    parameter.grad = None
            found.fisher = {name: values.numpy() for name, values in fisher.items()}
            if "gradient" in needs:
                sums = total or {name: parameter.grad for name, parameter in wanted}
                found.gradient = {
                    name: (values / len(self.windows)).numpy() for name, values in sums.items()
                }
        finally:
            for hook in hooks:
                hook.remove()
            for _, parameter in wanted:
                parameter.requires_grad_(False)
                parameter.grad = None
        if "blocks" in needs:
            means = np.array([np.mean(turns[index], axis=0) for index in range(len(prefixes))])
            found.angles, found.cosines = means[:, 0], means[:, 1]

    def _backward(self, torch: Any, model: Any, window: npt.NDArray[Any], *, learn: bool) -> None:
        with torch.set_grad_enabled(learn):
            ids = torch.from_numpy(np.asarray(window, dtype=np.int64)[None])
            logits = model(ids, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        if not bool(torch.isfinite(loss)):
            message = f"calibration: expected a finite loss, found {float(loss.detach())}"
            raise FormatError(message)
        if learn:
            loss.backward()


def _arrays(keep: Keep) -> dict[str, npt.NDArray[np.int64]]:
    return {name: np.asarray(units, dtype=np.int64) for name, units in keep.items()}


def _watch(torch: Any, turns: list[tuple[float, float]], prefix: str) -> Callable[..., None]:
    def hook(_: Any, args: Any, output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        turns.append(_turn(torch, args[0].detach(), after.detach(), prefix))

    return hook


def _turn(torch: Any, before: torch.Tensor, after: torch.Tensor, where: str) -> tuple[float, float]:
    """Return the mean angle between tokens' states, in half turns, and its mean cosine."""
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    if not bool(torch.isfinite(cosine).all()):
        message = f"calibration: {where}: expected finite hidden states, found others"
        raise FormatError(message)
    angle = torch.arccos(cosine.clamp(-1, 1)) / torch.pi
    return float(angle.mean()), float(cosine.mean())
