"""When what is pruned: a schedule is an iterator of events, and whoever trains follows it.

Each schedule is a few lines; methods that prune while they train, or in rounds, are one of these
and a loop over its events.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nybble.errors import ArgumentError

__all__ = ["ACTIONS", "Event", "one_shot", "ramp", "rounds"]

ACTIONS = ("train", "prune", "rewind")
"""What can happen: training up to a step, removing up to a share, going back to a step."""


@dataclass(frozen=True)
class Event:
    """One thing to do.

    Parameters
    ----------
    action
        One of :data:`ACTIONS`.
    step
        The step up to which is trained, at which is pruned, or to which weights go back.
    target
        For ``prune``, the share of the weights that is gone afterwards.
    """

    action: str
    step: int
    target: float = 0.0


def one_shot(target: float, steps: int = 0) -> Iterator[Event]:
    """Prune once, then train for some steps.

    Parameters
    ----------
    target
        Share to remove.
    steps
        Steps of training afterwards.
    """
    yield Event("prune", 0, _share(target))
    if steps:
        yield Event("train", steps)


def ramp(
    target: float,
    steps: int,
    *,
    begin: float = 0.25,
    end: float = 0.75,
    every: int = 1,
    power: int = 1,
) -> Iterator[Event]:
    """Remove more and more while training.

    ``s(u) = target (1 - (1 - u)^power)`` with ``u`` from 0 to 1 between the shares `begin` and
    `end` of the steps: linear with power 1, the cubic ramp of Zhu and Gupta (arXiv 1710.01878)
    with 3. A quarter to three quarters is what "The Journey Matters" (arXiv 2501.12486) finds best.

    Parameters
    ----------
    target
        Share that is gone in the end.
    steps
        Steps of training.
    begin, end
        Shares of the steps at which removing begins and ends.
    every
        Steps between two removals.
    power
        The ramp's.
    """
    if not 0 <= begin <= end <= 1 or steps < 1 or every < 1 or power < 1:
        message = (
            f"ramp: expected 0 <= begin <= end <= 1 and positive steps, found {begin}, {end}, "
        )
        message += f"{steps}, every {every}, power {power}"
        raise ArgumentError(message)
    _share(target)
    first, last = round(begin * steps), round(end * steps)
    places = sorted({*range(first + every, last, every), last})
    for step in places:
        if step:
            yield Event("train", step)
        u = (step - first) / max(last - first, 1) if last > first else 1.0
        yield Event("prune", step, target * (1 - (1 - u) ** power))
    if last < steps:
        yield Event("train", steps)


def rounds(share: float, count: int, steps: int, rewind: int = 0) -> Iterator[Event]:
    """Train, remove a share of what is left, go back; as often as is asked, then train once more.

    Parameters
    ----------
    share
        Share of the weights left that goes each time.
    count
        How many times.
    steps
        Steps of each training.
    rewind
        The step whose weights training starts from again.
    """
    _share(share)
    if count < 0 or not 0 <= rewind < steps:
        message = f"rounds: expected at least 0 rounds and a step below {steps} to go back to, "
        message += f"found {count} and {rewind}"
        raise ArgumentError(message)
    for turn in range(1, count + 1):
        yield Event("train", steps)
        yield Event("prune", steps, 1 - (1 - share) ** turn)
        yield Event("rewind", rewind)
    yield Event("train", steps)


def _share(value: float) -> float:
    if not 0 <= value < 1:
        message = f"schedule: expected a share of at least 0 and below 1, found {value}"
        raise ArgumentError(message)
    return value
