"""How many units each group keeps.

An allocator is given scores and a share of the groups' parameters to remove, and returns which
units stay. All of them take the lowest scores of a group first, in steps of ``round_to`` units
where a kernel or a quantization group wants multiples, never more than the floor allows, and so
that the parameters removed are as near to what was asked as steps allow.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from nybble.errors import ArgumentError
from nybble.prune.evidence import Evidence
from nybble.prune.graph import Group

__all__ = [
    "Additive",
    "Allocator",
    "Global",
    "Limits",
    "Sigmoid",
    "Table",
    "Uniform",
    "erk",
    "meet",
]

Doubles = npt.NDArray[np.float64]
Kept = dict[str, npt.NDArray[np.int64]]
Scores = Mapping[str, Doubles]


@dataclass(frozen=True)
class Limits:
    """What a group's kept units must satisfy.

    Parameters
    ----------
    round_to
        By kind of unit: kept units are a multiple of it, or all.
    floor
        Share of its units that a group keeps at least, and never less than one step.
    """

    round_to: Mapping[str, int] = field(default_factory=dict)
    floor: float = 0.1

    def steps(self, group: Group) -> list[int]:
        """Return how many units may stay, from all down to the floor."""
        step = self.round_to.get(group.kind, 1)
        # Blocks and layers have one unit each: their floor is that some of them stay.
        least = (
            0 if group.size == 1 else max(min(step, group.size), math.ceil(self.floor * group.size))
        )
        multiples = range(group.size // step * step, -1, -step)
        return [group.size, *(n for n in multiples if least <= n < group.size)]

    def removable(self, groups: Sequence[Group]) -> float:
        """Return the largest share of the groups' parameters that may go."""
        total = sum(group.size * group.cost for group in groups)
        left = sum(self.steps(group)[-1] * group.cost for group in groups)
        if groups and all(group.size == 1 for group in groups):
            left = max(group.cost for group in groups)
        return 1 - left / max(total, 1)

    def check(self, groups: Sequence[Group], share: float) -> None:
        """Refuse a share that would empty a layer.

        Raises
        ------
        ArgumentError
            When more is to go than the floors allow.
        """
        most = self.removable(groups)
        if share > most + 1e-9:
            kinds = ", ".join(sorted({group.kind for group in groups}))
            message = f"ratio: expected at most {most:.3f} of the parameters in {kinds} units to "
            message += f"go, or a layer would be left empty; found {share:.3f}"
            raise ArgumentError(message)


class Allocator(ABC):
    """A way to spread a budget. Subclasses are frozen dataclasses of their settings."""

    @property
    def needs(self) -> frozenset[str]:
        """Names in :data:`nybble.prune.evidence.NEEDS`."""
        return frozenset()

    @abstractmethod
    def keep(
        self,
        groups: Sequence[Group],
        scores: Scores,
        share: float,
        limits: Limits,
        evidence: Evidence,
    ) -> Kept:
        """Return the units that stay.

        Parameters
        ----------
        groups
            The groups that may lose units.
        scores
            Scores of their units, by the groups' names; higher ones stay.
        share
            Share of the groups' parameters to remove.
        limits
            What the result must satisfy.
        evidence
            What was measured.
        """


def best(scores: Doubles, count: int) -> npt.NDArray[np.int64]:
    """Return the rising indices of the `count` highest scores; of equal ones the later stay."""
    order = np.argsort(scores, kind="stable")
    return np.sort(order[len(order) - count :]).astype(np.int64)


def by_shares(
    groups: Sequence[Group],
    scores: Scores,
    shares: Mapping[str, float],
    limits: Limits,
    left: Kept | None = None,
) -> Kept:
    """Remove a share of each group's units; what rounding leaves is carried to the next.

    Parameters
    ----------
    groups, scores, limits
        As of :meth:`Allocator.keep`.
    shares
        The share of each group, by name.
    left
        Units that are left of earlier removals, and among which those that stay are.
    """
    kept: Kept = {}
    owed = 0.0  # parameters that should have gone by now and have not
    for group in groups:
        wanted = shares[group.name] * group.size * group.cost + owed
        steps = limits.steps(group)
        values = scores[group.name]
        if left is not None:
            steps = [count for count in steps if count <= len(left[group.name])]
            values = np.full(group.size, -np.inf)
            values[left[group.name]] = scores[group.name][left[group.name]]
        removed = [(group.size - count) * group.cost for count in steps]
        nearest = min(range(len(steps)), key=lambda i: abs(removed[i] - wanted))
        owed = wanted - removed[nearest]
        kept[group.name] = best(values, steps[nearest])
    return kept


def meet(
    ratio: float,
    most: float,
    keep: Callable[[float], Kept],
    removed: Callable[[Kept], float],
) -> Kept:
    """Return the units that stay so that what is removed is nearest to a ratio.

    For units that share weights: a convolution that loses half of its inputs and half of its
    outputs is left with a quarter. Shares of units are tried, each half as far from the last.

    Parameters
    ----------
    ratio
        What is to go, as `removed` counts it.
    most
        The largest share of the units that may go.
    keep
        Returns the units that stay when a share of them goes.
    removed
        Returns what that removes; it rises with the share.

    Raises
    ------
    ArgumentError
        When more is to go than that share comes to.
    """
    low, high = 0.0, max(most, 0.0)
    best_found = keep(high)
    reached = removed(best_found)
    if reached < ratio and ratio - reached > 1e-3:
        message = f"ratio: expected at most {reached:.3f}, or a layer would be left empty; "
        message += f"found {ratio}"
        raise ArgumentError(message)
    for _ in range(24):
        middle = (low + high) / 2
        found = keep(middle)
        share = removed(found)
        if abs(share - ratio) < abs(reached - ratio):
            best_found, reached = found, share
        low, high = (middle, high) if share < ratio else (low, middle)
    return best_found


@dataclass(frozen=True)
class Uniform(Allocator):
    """Every group loses the same share."""

    def keep(
        self,
        groups: Sequence[Group],
        scores: Scores,
        share: float,
        limits: Limits,
        evidence: Evidence,
    ) -> Kept:
        """See :meth:`Allocator.keep`."""
        limits.check(groups, share)
        return by_shares(groups, scores, dict.fromkeys((g.name for g in groups), share), limits)


@dataclass(frozen=True)
class Global(Allocator):
    """All units of all groups are ranked together; each weighs as many parameters as it has.

    Scores of different groups must be comparable: normalise them first.
    """

    def keep(
        self,
        groups: Sequence[Group],
        scores: Scores,
        share: float,
        limits: Limits,
        evidence: Evidence,
    ) -> Kept:
        """See :meth:`Allocator.keep`."""
        limits.check(groups, share)
        total = sum(group.size * group.cost for group in groups)
        # A step is as good as its units on average; a group's steps go from the worst on.
        steps: list[tuple[float, int, int, int]] = []
        for place, group in enumerate(groups):
            rising = np.sort(scores[group.name])
            counts = limits.steps(group)
            for turn, (before, after) in enumerate(itertools.pairwise(counts)):
                worst = rising[group.size - before : group.size - after]
                steps.append((float(worst.mean()), place, turn, (before - after) * group.cost))
        left = [group.size for group in groups]
        removed = 0
        for _, place, turn, cost in sorted(steps):
            # The step that passes the budget is taken if that comes nearer to it.
            if removed + cost / 2 > share * total:
                break
            removed += cost
            left[place] = limits.steps(groups[place])[turn + 1]
        pairs = zip(groups, left, strict=True)
        return {group.name: best(scores[group.name], count) for group, count in pairs}


@dataclass(frozen=True)
class Sigmoid(Allocator):
    """Layers that turn their inputs more keep more (CFSP's coarse step).

    Kept shares are ``sigmoid(slope z)`` of the standardised importance ``z`` of layers, scaled to
    the mean that the budget asks for; while one is above 1, the slope is divided by 1.05.

    Parameters
    ----------
    slope
        How much importance matters; 0 is uniform.
    """

    slope: float = 1.0

    @property
    def needs(self) -> frozenset[str]:
        """The layers' importance."""
        return frozenset({"blocks"})

    def shares(self, importance: Doubles, share: float, most: float) -> Doubles:
        """Return the share that each layer loses."""
        spread = importance.std()
        z = (importance - importance.mean()) / spread if spread > 0 else 0 * importance
        slope = self.slope
        while True:
            kept = 1 / (1 + np.exp(-slope * z))
            kept *= (1 - share) / kept.mean()
            if (kept <= 1 + 1e-12).all() and (kept >= 1 - most - 1e-12).all():
                return np.asarray(1 - np.minimum(kept, 1))
            slope /= 1.05

    def keep(
        self,
        groups: Sequence[Group],
        scores: Scores,
        share: float,
        limits: Limits,
        evidence: Evidence,
    ) -> Kept:
        """See :meth:`Allocator.keep`."""
        limits.check(groups, share)
        of = self.shares(evidence.angles, share, limits.removable(groups))
        named = {group.name: float(of[_layer(group)]) for group in groups}
        return by_shares(groups, scores, named, limits)


@dataclass(frozen=True)
class Additive(Allocator):
    """Layers that change their inputs more lose less, relative to the mean (Adapt-Pruner's step).

    The share of layer ``l`` is ``share - amplitude * m_l``, with the importance ``m`` centred and
    divided by its largest magnitude.

    Parameters
    ----------
    amplitude
        The paper's ``A`` for the whole removal.
    """

    amplitude: float = 0.02

    @property
    def needs(self) -> frozenset[str]:
        """The layers' importance."""
        return frozenset({"blocks"})

    def offsets(self, cosines: Doubles) -> Doubles:
        """Return what each layer's share differs by from the mean; they add up to 0."""
        importance = -cosines
        centred = importance - importance.mean()
        largest = np.abs(centred).max()
        return np.asarray(-self.amplitude * (centred / largest if largest > 0 else centred))

    def keep(
        self,
        groups: Sequence[Group],
        scores: Scores,
        share: float,
        limits: Limits,
        evidence: Evidence,
    ) -> Kept:
        """See :meth:`Allocator.keep`."""
        limits.check(groups, share)
        of = np.clip(share + self.offsets(evidence.cosines), 0, 0.99)
        named = {group.name: float(of[_layer(group)]) for group in groups}
        return by_shares(groups, scores, named, limits)


@dataclass(frozen=True)
class Table(Allocator):
    """Shares are given.

    Parameters
    ----------
    shares
        The share that each group loses, by name; those not named lose none.
    """

    shares: Mapping[str, float]

    def keep(
        self,
        groups: Sequence[Group],
        scores: Scores,
        share: float,
        limits: Limits,
        evidence: Evidence,
    ) -> Kept:
        """See :meth:`Allocator.keep`; `share` has no meaning here."""
        named = {group.name: self.shares.get(group.name, 0.0) for group in groups}
        return by_shares(groups, scores, named, limits)


def erk(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Return a density for each tensor by the Erdos-Renyi-kernel rule.

    A tensor's density is proportional to the sum over the product of its dimensions; what would
    have more than 1 has 1, and the others share what is left (Evci et al., arXiv 1911.11134).

    Parameters
    ----------
    shapes
        Shapes by name.
    density
        Share of all weights that stays, above 0 and at most 1.

    Raises
    ------
    ArgumentError
        When the density is out of its range.
    """
    if not 0 < density <= 1:
        message = f"density: expected a share above 0 and at most 1, found {density}"
        raise ArgumentError(message)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        sparse = [name for name in shapes if name not in dense]
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = budget / max(sum(raw[name] * sizes[name] for name in sparse), 1e-300)
        over = [name for name in sparse if scale * raw[name] > 1]
        if not over:
            return {name: 1.0 if name in dense else scale * raw[name] for name in shapes}
        dense.update(over)


def _layer(group: Group) -> int:
    assert group.layer is not None  # these allocators are for units of layers
    return group.layer
