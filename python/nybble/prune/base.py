"""What a pruning method is made of: a criterion, an allocator, a compensator, and their settings.

Two kinds of methods: one that removes :class:`Structured` units, whole heads and neurons, after
which a model is smaller; and one that takes out single weights (:class:`Sparse`), which leaves
every matrix its shape and zeros in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from nybble import _nybble
from nybble.calibrate.stats import InputStats
from nybble.errors import ArgumentError, FormatError
from nybble.prune.allocate import Allocator, Kept, Limits, Uniform, meet
from nybble.prune.compensate import Compensator, Nothing
from nybble.prune.evidence import GRADIENTS, Evidence, Lens
from nybble.prune.graph import Group, UnitGraph

__all__ = [
    "Criterion",
    "PruneMethod",
    "Sparse",
    "Structured",
    "neighbours",
    "number",
    "standardised",
]

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]


def number(name: str, value: object, low: float, high: float, *, whole: bool = False) -> None:
    """Refuse what is not a number in a range, its ends included.

    Raises
    ------
    ArgumentError
        When it is not; the setting is named.
    """
    kinds = (int,) if whole else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool)
    if not good or not low <= value <= high:  # type: ignore[operator]
        kind = "a whole number" if whole else "a number"
        message = f"prune.{name}: expected {kind} from {low:g} to {high:g}, found {value!r:.60}"
        raise ArgumentError(message)


def one_of(name: str, value: object, known: Sequence[object]) -> None:
    """Refuse what is not one of some values."""
    # `1 == True`: a recipe that says so is mistaken all the same.
    if not any(value == one and type(value) is type(one) for one in known):
        message = f"prune.{name}: expected one of {', '.join(map(str, known))}; found {value!r:.60}"
        raise ArgumentError(message)


class PruneMethod(ABC):
    """A paper's way to prune. Subclasses are frozen dataclasses of its settings."""

    @property
    @abstractmethod
    def reads_text(self) -> bool:
        """Whether anything looks at activations or gradients, of text or of images."""

    @property
    @abstractmethod
    def gradients(self) -> bool:
        """Whether anything looks at the gradient of a loss, which is one on text."""


class Criterion(ABC):
    """A way to tell what a unit is worth. Subclasses are frozen dataclasses of their settings."""

    @property
    def needs(self) -> frozenset[str]:
        """Names in :data:`nybble.prune.evidence.NEEDS`."""
        return frozenset()

    @abstractmethod
    def score(self, group: Group, evidence: Evidence) -> Doubles:
        """Return what each unit of a group is worth ``[size]``; the lowest go first."""

    def scores(self, groups: Sequence[Group], evidence: Evidence) -> dict[str, Doubles]:
        """Return scores by the groups' names.

        Raises
        ------
        FormatError
            When one is not a finite number.
        """
        out = {}
        for group in groups:
            with np.errstate(invalid="ignore", over="ignore"):
                values = self.score(group, evidence)
            if not np.isfinite(values).all():
                found = values[~np.isfinite(values)][0]
                message = f"{group.name}: expected finite scores, found {found}"
                raise FormatError(message)
            out[group.name] = values
        return out


def standardised(scores: Doubles) -> Doubles:
    """Return scores less their mean, divided by their standard deviation."""
    spread = scores.std()
    return np.asarray((scores - scores.mean()) / spread if spread > 0 else 0 * scores)


@dataclass(frozen=True)
class Structured(PruneMethod):
    """Removes units.

    Parameters
    ----------
    ratio
        Share to remove: of the parameters of the layers, or with ``scope: model`` of all of them,
        embedding and head included.
    scope
        ``layers`` or ``model``.
    attention
        What attention loses: ``kv``, key and value heads with all their query heads; ``head``,
        single query heads; or ``none``.
    mlp
        Whether feed-forward blocks lose neurons.
    hidden
        Whether the residual stream loses channels, and with them every linear, norm and embedding.
    round_to
        Neurons that stay in a layer are a multiple of it, and so are channels that stay: groups of
        a quantization end there.
    floor
        Share of its units that each layer keeps at least.
    """

    ratio: float = 0.2
    scope: str = "layers"
    attention: str = "kv"
    mlp: bool = True
    hidden: bool = False
    round_to: int = 32
    floor: float = 0.1

    propagate: ClassVar[str] = "pruned"
    """Whether statistics for the compensation are those behind ``pruned`` or ``dense`` layers."""

    scores_hidden: ClassVar[bool] = False
    """Whether the criterion and the allocator can do with channels of the residual stream."""

    def __post_init__(self) -> None:
        number("ratio", self.ratio, 0, 0.99)
        number("floor", self.floor, 0.001, 1)
        one_of("scope", self.scope, ("layers", "model"))
        one_of("attention", self.attention, ("kv", "head", "none"))
        one_of("mlp", self.mlp, (True, False))
        one_of("hidden", self.hidden, (True, False) if self.scores_hidden else (False,))
        number("round_to", self.round_to, 1, 1 << 20, whole=True)
        if not self.kinds:
            message = "prune: expected units to remove, found attention: none, mlp: false and "
            message += "hidden: false"
            raise ArgumentError(message)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of units that may go (:data:`nybble.prune.graph.KINDS`)."""
        heads = () if self.attention == "none" else (self.attention,)
        neurons = ("neuron",) if self.mlp else ()
        return (*heads, *neurons, "hidden") if self.hidden else (*heads, *neurons)

    @property
    @abstractmethod
    def criterion(self) -> Criterion:
        """What tells what units are worth."""

    @property
    def allocator(self) -> Allocator:
        """What spreads the budget."""
        return Uniform()

    @property
    def compensator(self) -> Compensator:
        """What makes up for the loss."""
        return Nothing()

    @property
    def limits(self) -> Limits:
        """What the kept units satisfy."""
        return Limits({"neuron": self.round_to, "hidden": self.round_to}, self.floor)

    @property
    def reads_text(self) -> bool:
        """Whether anything looks at activations or gradients."""
        return bool(self.criterion.needs | self.allocator.needs | self.compensator.needs)

    @property
    def gradients(self) -> bool:
        """Whether anything looks at the gradient of a loss, which is one on text."""
        return bool(GRADIENTS & (self.criterion.needs | self.allocator.needs))

    def select(self, groups: list[Group], depth: int) -> list[Group]:
        """Return the groups that may lose units, in a model with this many layers."""
        return groups

    def counted(self, graph: UnitGraph) -> list[str] | None:
        """Return the tensors whose parameters the ratio is a share of; ``None`` for all."""
        prefixes = tuple(f"{layer.prefix}." for layer in graph.layers)
        layers = [name for name in graph.shapes if name.startswith(prefixes)]
        return layers if self.scope == "layers" and prefixes else None

    def share(self, graph: UnitGraph, groups: Sequence[Group]) -> float:
        """Return the budget as a share of the parameters in the groups' units.

        Raises
        ------
        ArgumentError
            When those are fewer than what is to go.
        """
        inside = sum(group.size * group.cost for group in groups)
        scope = graph.parameters(self.counted(graph))
        share = self.ratio * scope / max(inside, 1)
        if share >= 1:
            message = f"ratio: {self.ratio} of the {self.scope}' {scope} parameters are more than "
            message += f"the {inside} of the units that may go"
            raise ArgumentError(message)
        return share

    def keep(self, graph: UnitGraph, lens: Lens) -> Kept:
        """Return the units that stay."""
        groups = self.select(graph.of(*self.kinds), len(graph.layers))
        # What runs through all layers shares its weights with the units in them.
        shared = any(group.layer is None for group in groups)
        if not shared:
            self.limits.check(groups, self.share(graph, groups))
        evidence = lens.evidence(self.criterion.needs | self.allocator.needs)
        scores = self.criterion.scores(groups, evidence)

        def keep(share: float) -> Kept:
            return self.allocator.keep(groups, scores, share, self.limits, evidence)

        if not shared:
            return keep(self.share(graph, groups))
        counted = self.counted(graph)
        total = graph.parameters(counted)
        most = self.limits.removable(groups)
        return meet(
            self.ratio, most, keep, lambda kept: 1 - graph.parameters_left(kept, counted) / total
        )


def neighbours(pattern: str) -> tuple[int, int] | None:
    """Return how many go of how many in ``2:4`` and the like; ``None`` for ``unstructured``.

    In ``n:m`` it is ``n`` of each ``m`` consecutive inputs that stay.

    Raises
    ------
    ArgumentError
        When it is neither.
    """
    if pattern == "unstructured":
        return None
    left, colon, of = str(pattern).partition(":")
    if not (colon and left.isdecimal() and of.isdecimal() and 0 < int(left) < int(of) <= 64):
        message = "prune.pattern: expected unstructured, or n:m with n below m, as in 2:4; "
        message += f"found {pattern!r:.60}"
        raise ArgumentError(message)
    return int(of) - int(left), int(of)


@dataclass(frozen=True)
class Sparse(PruneMethod):
    """Takes out single weights of the layers' linears.

    Parameters
    ----------
    ratio
        Share of each matrix to take out; with a pattern ``n:m`` it follows from that.
    pattern
        ``unstructured``, or ``n:m``: of each m consecutive inputs of a row n stay.
    """

    ratio: float = 0.5
    pattern: str = "unstructured"

    among: ClassVar[str] = "row"
    """Where an unstructured mask ranks: within each ``row``, or in ``all`` of a matrix."""

    def __post_init__(self) -> None:
        number("ratio", self.ratio, 0, 0.99)
        neighbours(self.pattern)

    @property
    def needs(self) -> frozenset[str]:
        """Names in :data:`nybble.calibrate.stats.NEEDS`."""
        return frozenset()

    @property
    def gradients(self) -> bool:
        """Whether ``fisher`` (:data:`nybble.prune.evidence.NEEDS`) is needed."""
        return False

    @property
    def reads_text(self) -> bool:
        """Whether anything looks at activations or gradients."""
        return bool(self.needs) or self.gradients

    @abstractmethod
    def score(
        self, name: str, weights: Floats, inputs: InputStats | None, fisher: Floats | None
    ) -> Floats:
        """Return what each weight is worth ``[rows, cols]``; the lowest go.

        Parameters
        ----------
        name
            The linear's path.
        weights
            Its weights ``[rows, cols]``.
        inputs
            Statistics of what it reads.
        fisher
            Sums of its squared gradients ``[rows, cols]``.
        """

    def prune(
        self,
        name: str,
        weights: Floats,
        inputs: InputStats | None,
        fisher: Floats | None,
        threads: int | None,
    ) -> tuple[Floats, Bools]:
        """Return the weights with zeros in them, and which stay."""
        scores = self.score(name, weights, inputs, fisher)
        scores = np.ascontiguousarray(scores, dtype=np.float32)
        if not np.isfinite(scores).all():
            message = f"{name}: expected finite scores, found {scores[~np.isfinite(scores)][0]}"
            raise FormatError(message)
        few = self.neighbours(name, weights.shape[1])
        drop = int(self.ratio * (weights.shape[1] if self.among == "row" else weights.size))
        if few is not None:
            keep = _nybble.select(scores, few[0], few[1], threads)
        else:
            keep = _nybble.select(scores, drop, "row" if self.among == "row" else "all", threads)
        stays = keep.view(np.bool_)
        return weights * stays, stays

    def neighbours(self, name: str, cols: int) -> tuple[int, int] | None:
        """Return the pattern, if it has one, and refuse what it does not divide."""
        few = neighbours(self.pattern)
        if few is not None and cols % few[1]:
            message = (
                f"{name}: expected a multiple of {few[1]} inputs for {self.pattern}, found {cols}"
            )
            raise ArgumentError(message)
        return few
