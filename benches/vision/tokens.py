"""What do patches left out cost, by each method, at equal arithmetic?

Usage::

    python -m benches.vision.tokens --onnx vit_s_focus.onnx --data DATA [--json FILE]
        [--reduction 0.35] [--trials 60] [--images 200] [--models cifar10-vit,dinov2-saliency]

Every method gets a schedule by the same search (:func:`nybble.tokens.tune`: so many random ones,
all of the wanted cost), on images that are not measured on and without labels. Then, with intervals
of 95 % from 2000 bootstrap samples of the images:

* the CIFAR-10 model on its test images: right answers, the share of answers that dense has, and how
  much of the right answers is lost beside chance at the same cost;
* DINOv2-S with its saliency head, on ImageNet samples: overlap (intersection over union) of what
  is more salient than a half with the dense model's. The head wants a full grid: a merged patch has
  its token's features, one that left those of the nearest patch that is still there.

Chance is measured with several seeds. Trials are kept in ``--work`` and a second run goes on there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from benches.vision.models import CLASSES, CONVERTERS, Saliency
from benches.vision.parity import pictures

import nybble
from nybble.runtime.encoder import Encoding, ImageEncoder
from nybble.tokens import tune

Floats = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]

METHODS = ("random", "attention_received", "evit", "zero_tprune", "tome")
SEEDS = 5
_BATCH = 8
_SAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean over images and where it lies with 95 %."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:7.4f} [{self.low:7.4f}, {self.high:7.4f}]"


def interval(values: Scores, seed: int = 0) -> Interval:
    """Bootstrap the mean of one number an image."""
    numbers = np.random.default_rng(seed)
    picks = numbers.integers(0, len(values), (_SAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def full_grid(found: Encoding) -> Floats:
    """Return features for every patch, ``[images, rows, columns, hidden]``."""
    rows, cols = found.grid
    if found.owners is None:
        return found.patches
    owners = found.owners.astype(np.int64)
    places = np.stack(np.divmod(np.arange(rows * cols), cols), axis=1)
    grids = []
    for tokens, owner in zip(found.tokens, owners, strict=True):
        gone = owner == np.iinfo(np.uint32).max
        left = np.flatnonzero(~gone)
        distances = ((places[:, None] - places[None, left]) ** 2).sum(axis=2)
        nearest = left[distances.argmin(axis=1)]
        learned = len(tokens) - int(owner[left].max()) - 1
        grids.append(tokens[learned + owner[np.where(gone, nearest, np.arange(rows * cols))]])
    return np.stack(grids).reshape(len(grids), rows, cols, -1)


def overlaps(found: Floats, wanted: Floats) -> Scores:
    """Return the intersection over union of each image's salient part; 1 where there is none."""
    a, b = found > 0.5, wanted > 0.5
    union, shared = ((x).sum(axis=(1, 2)) for x in (a | b, a & b))
    return np.where(union > 0, shared / np.maximum(union, 1), 1.0)


def encode(
    model: ImageEncoder, pixels: Floats, tokens: Any, make: Callable[[Encoding], Floats]
) -> Floats:
    """Return what `make` makes of the encodings, some images at a time."""
    parts = range(0, len(pixels), _BATCH)
    return np.concatenate(
        [make(model.encode(pixels[i : i + _BATCH], tokens=tokens)) for i in parts]
    )


def compare(
    name: str,
    model: ImageEncoder,
    search: Floats,
    measure: Callable[[Any], dict[str, Scores]],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Search a schedule for every method and measure it."""
    size = (search.shape[2], search.shape[3])
    found: dict[str, Any] = {}
    chance: dict[str, Scores] = {}
    print(f"{name}: {arguments.reduction:.0%} of the arithmetic less")
    for method in METHODS:
        best = tune(
            model,
            search,
            method=method,
            reduction=arguments.reduction,
            trials=arguments.trials,
            state=arguments.work / f"{name}-{method}-{arguments.reduction}-{len(search)}.trials",
        )
        seeds = range(SEEDS) if method == "random" else range(1)
        runs = [
            measure(best.tokens | ({"seed": seed} if method == "random" else {})) for seed in seeds
        ]
        scores = {key: np.mean([run[key] for run in runs], axis=0) for key in runs[0]}
        chance = chance or scores
        saved = 1 - model.macs(size, best.tokens) / model.macs(size, "off")
        row: dict[str, Any] = {"tokens": best.tokens, "saved": saved}
        for key, values in scores.items():
            row[key] = vars(interval(values))
            row[f"{key}, beside chance"] = vars(interval(values - chance[key]))
        found[method] = row
        print(f"  {method}: {saved:.1%} saved, {json.dumps(best.tokens)}")
        for key in scores:
            beside = Interval(**row[f"{key}, beside chance"])
            print(f"    {key:24} {Interval(**row[key])}   beside chance {beside}", flush=True)
    return found


def cifar(model: ImageEncoder, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare on CIFAR-10."""
    archive = arguments.data / "vision" / "cifar10_jpeg_train500_test500.zip"
    images = pictures(archive, "test/")
    truth = np.array([CLASSES.index(name.split("/")[1]) for name, _ in images])
    pixels = model.preprocess([image for _, image in images])
    search = model.preprocess([image for _, image in pictures(archive, "train/")[::5]])
    dense = model.encode(pixels).logits
    assert dense is not None
    print(f"cifar10-vit: {len(pixels)} images, dense {(dense.argmax(1) == truth).mean():.1%} right")

    def measure(tokens: Any) -> dict[str, Scores]:
        logits = model.encode(pixels, tokens=tokens).logits
        assert logits is not None
        answers = logits.argmax(1)
        return {
            "right": (answers == truth).astype(np.float64),
            "as dense": (answers == dense.argmax(1)).astype(np.float64),
        }

    return compare("cifar10-vit", model, search, measure, arguments)


def saliency(model: ImageEncoder, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare saliency maps."""
    archive = arguments.data / "vision" / "imagenet_sample_200.zip"
    images = [image for _, image in pictures(archive, "")]
    search = model.preprocess(images[::8])
    pixels = model.preprocess(
        [image for i, image in enumerate(images) if i % 8][: arguments.images]
    )
    head, size = Saliency(folder), pixels.shape[2:]
    maps = encode(model, pixels, None, lambda e: head(full_grid(e), size))

    def measure(tokens: Any) -> dict[str, Scores]:
        return {
            "overlap of maps": overlaps(
                encode(model, pixels, tokens, lambda e: head(full_grid(e), size)), maps
            )
        }

    print(f"dinov2-saliency: {len(pixels)} images of {size[0]} pixels")
    return compare("dinov2-saliency", model, search, measure, arguments)


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description="Compare methods that prune patches.")
    parser.add_argument("--onnx", type=Path, help="the DINOv2 saliency model")
    parser.add_argument("--data", type=Path, required=True, help="the folder with vision/, models/")
    parser.add_argument("--work", type=Path, default=Path("/tmp/nybble-vision-tokens"))
    parser.add_argument("--models", default="cifar10-vit,dinov2-saliency")
    parser.add_argument("--reduction", type=float, default=0.35)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--images", type=int, default=200, help="ImageNet samples at most")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    sources = {
        "cifar10-vit": arguments.data / "models" / "cifar10_vit_d128_l6_p4.pth",
        "dinov2-saliency": arguments.onnx,
    }
    found: dict[str, Any] = {}
    for name in arguments.models.split(","):
        if sources.get(name) is None:
            parser.error(f"{name}: expected a model there is, with its file")
        folder = arguments.work / name
        if not folder.exists():
            CONVERTERS[name](sources[name], folder)
        model = nybble.load(folder)
        found[name] = (
            cifar(model, arguments) if name == "cifar10-vit" else saliency(model, folder, arguments)
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
