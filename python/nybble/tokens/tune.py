"""Search for a schedule: where to prune and how much, for a share of the arithmetic.

Zero-TPrune's hyper-parameters (pruning layers, the share each keeps, how many tokens with a twin it
removes) depend on the model. As its paper does, :func:`tune` draws schedules at random (Monte
Carlo), all of the same cost, and keeps the one that changes the model's own output least on some
images: no labels are needed, and nothing is trained. Any method that prunes patches can be tuned.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.errors import ArgumentError, FileError, FormatError
from nybble.tokens.patches import PatchMethod

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nybble.runtime.encoder import Encoding, ImageEncoder

__all__ = ["Trial", "divergence", "tune"]

_LEAST = 0.1
"""The smallest share that a drawn layer keeps."""
_TOLERANCE = 0.01
"""How far a schedule's cost may be from what was asked for, or one patch in all layers."""
_DRAWS = 20
"""Draws for a trial: not all layers can save what is asked for."""
_BATCH = 16


@dataclass(frozen=True)
class Trial:
    """A schedule and what it costs.

    Parameters
    ----------
    tokens
        The method's ``name`` and settings.
    macs
        Its share of the dense model's multiplications.
    divergence
        See :func:`divergence`.
    """

    tokens: dict[str, Any]
    macs: float
    divergence: float


def divergence(found: Encoding, dense: Encoding) -> float:
    """Return how far pruned outputs are from the dense ones, the mean over images.

    The Kullback-Leibler divergence of the class probabilities in nats; without a classifier 1 minus
    the cosine of the embeddings.
    """
    import numpy as np

    if dense.logits is not None and found.logits is not None:
        p, q = (_log_softmax(logits.astype(np.float64)) for logits in (dense.logits, found.logits))
        return float((np.exp(p) * (p - q)).sum(axis=1).mean())
    a, b = found.embedding.astype(np.float64), dense.embedding.astype(np.float64)
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(1 - cosine.mean())


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    import numpy as np

    shifted = logits - logits.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def tune(
    model: ImageEncoder,
    pixels: npt.NDArray[np.float32],
    *,
    method: str = "zero_tprune",
    reduction: float = 0.35,
    trials: int = 60,
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int, Trial], None] | None = None,
) -> Trial:
    """Find the schedule that changes a model's outputs least at a given cost.

    Parameters
    ----------
    model
        The encoder.
    pixels
        Prepared images, ``[images, channels, height, width]``; some dozens will do. The schedule
        is for images of that size.
    method
        A name in :data:`nybble.tokens.PATCH_METHODS`.
    reduction
        Share of the dense model's multiplications to save, above 0 and below 1.
    trials
        Schedules to draw.
    seed
        Of the draw: the same seed draws the same schedules, whatever their number.
    state
        A file that trials are written to as they are done; a search that was interrupted goes on
        from it. Without one nothing is kept.
    progress
        Called behind each trial with the number done, the number wanted, and the best so far.

    Returns
    -------
    The best trial; its ``tokens`` are what :meth:`ImageEncoder.encode` takes.

    Raises
    ------
    ArgumentError
        When settings mean nothing or no drawn schedule has that cost.
    FormatError
        When `state` is not that of this search.
    """
    import numpy as np

    from nybble.tokens import PATCH_METHODS

    kind = PATCH_METHODS.lookup(method)
    if not 0 < reduction < 1:
        message = f"reduction: expected a share above 0 and below 1, found {reduction!r}"
        raise ArgumentError(message)
    for name, value in (("trials", trials), ("images", len(pixels))):
        if value < 1:
            message = f"{name}: expected at least one, found {value!r}"
            raise ArgumentError(message)
    size = (int(pixels.shape[2]), int(pixels.shape[3]))
    header = {
        "model": str(model.path.resolve()),
        "macs": model.macs(size, tokens="off"),
        "method": method,
        "reduction": reduction,
        "seed": seed,
        "images": [*pixels.shape],
        "sum": float(np.abs(pixels, dtype=np.float64).sum()),
    }
    done = _Done(None if state is None else Path(state), header)
    dense = [
        model.encode(pixels[i : i + _BATCH], tokens="off") for i in range(0, len(pixels), _BATCH)
    ]
    best: Trial | None = None
    for number in range(trials):
        trial = done.trials.get(number)
        if trial is None:
            numbers = np.random.default_rng([seed, number])
            trial = None
            for _ in range(_DRAWS):
                drawn = _draw(model, kind, method, size, 1 - reduction, numbers)
                if drawn is None:
                    continue
                tokens, macs = drawn
                lost = [
                    divergence(model.encode(pixels[i : i + _BATCH], tokens=tokens), wanted)
                    * len(wanted.tokens)
                    for i, wanted in zip(range(0, len(pixels), _BATCH), dense, strict=True)
                ]
                trial = Trial(tokens, macs, sum(lost) / len(pixels))
                break
            done.add(number, trial)
        if trial is not None and (best is None or trial.divergence < best.divergence):
            best = trial
        if progress is not None and best is not None:
            progress(number + 1, trials, best)
    if best is None:
        message = f"reduction: expected what {method} can save in this model, found {reduction}"
        raise ArgumentError(message)
    return best


def _draw(
    model: ImageEncoder,
    kind: type[PatchMethod],
    name: str,
    size: tuple[int, int],
    wanted: float,
    numbers: np.random.Generator,
) -> tuple[dict[str, Any], float] | None:
    """Return a random schedule of that cost, and its cost; none where it cannot save so much.

    How strongly each layer prunes is drawn first, and then a common factor brings the cost to what
    is wanted.
    """
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    depth = int(model.info["layers"])
    high, wide = model.info["patch"]
    patches = (size[0] // high) * (size[1] // wide)
    # Merging takes few tokens in each of many layers; dropping takes many in a few.
    most = depth if "r" in fields else min(5, depth)
    count = int(numbers.integers(1, most + 1))
    layers = sorted(int(layer) for layer in numbers.choice(depth, size=count, replace=False))
    strength = numbers.dirichlet([1.0] * count)
    twins = numbers.uniform()  # of what leaves, the part that does for having a twin

    def schedule(factor: float) -> dict[str, Any]:
        gone = [min(factor * float(part), 1 - _LEAST) for part in strength]
        made: dict[str, Any] = {"name": name, "layers": layers}
        if "r" in fields:
            return made | {"r": [round(share * patches) for share in gone]}
        if "similar" in fields:
            made["similar"] = [round(share * twins * patches) for share in gone]
            gone = [share * (1 - twins) for share in gone]
        return made | {"keep": [round(1 - share, 4) for share in gone]}

    dense = model.macs(size, tokens="off")
    low, top = 0.0, float(count)
    for _ in range(40):
        factor = (low + top) / 2
        share = model.macs(size, tokens=schedule(factor)) / dense
        low, top = (factor, top) if share > wanted else (low, factor)
    made = schedule(top)
    share = model.macs(size, tokens=made) / dense
    return (made, share) if abs(share - wanted) < max(_TOLERANCE, 1 / patches) else None


class _Done:
    """Trials that are done, in a file of one JSON object a line."""

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self.path = path
        self.trials: dict[int, Trial | None] = {}
        self._known: set[int] = set()
        if path is None:
            return
        try:
            if path.exists():
                self._read(path, header)
            else:
                path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        except OSError as error:
            raise FileError(error.errno, error.strerror, str(path)) from None

    def _read(self, path: Path, header: dict[str, Any]) -> None:
        lines = path.read_text(encoding="utf-8").splitlines()
        try:
            read = [json.loads(line) for line in lines]
        except ValueError:
            read = []
        if not read or read[0] != header:
            message = f"{path}: expected trials of this search, found another file's"
            raise FormatError(message)
        for row in read[1:]:
            number = int(row["trial"])
            self._known.add(number)
            if row["tokens"] is not None:
                self.trials[number] = Trial(row["tokens"], row["macs"], row["divergence"])

    def add(self, number: int, trial: Trial | None) -> None:
        """Write a trial."""
        if self.path is None or number in self._known:
            return
        row = {"tokens": None} if trial is None else dataclasses.asdict(trial)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"trial": number, **row}) + "\n")
        except OSError as error:
            raise FileError(error.errno, error.strerror, str(self.path)) from None
