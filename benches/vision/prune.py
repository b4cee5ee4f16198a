"""What do image encoders lose with a part of their heads and neurons, by each method?

Usage::

    python -m benches.vision.prune --onnx vit_s_focus.onnx --data DATA [--csv FILE]
        [--models dinov2-saliency,cifar10-vit] [--ratios 0.1,0.2,0.3] [--methods refit,flap]

Every method removes the same share of the layers' parameters. Those that look at images see some
that are not measured on: 64 of the ImageNet samples for DINOv2-S, 250 training images for the
CIFAR-10 model, about 16400 tokens of either. Then, with intervals of 95 % from 2000 bootstrap
samples of the images, what is left is compared with the whole model in float32:

* DINOv2-S with its saliency head, on 48 other ImageNet samples: overlap (intersection over union)
  of what is more salient than a half;
* the CIFAR-10 model, on its test images: right answers.

Chance is the mean of several seeds. Weights that are left are float16.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from benches.vision.models import CLASSES, CONVERTERS, Saliency
from benches.vision.parity import maps, pictures
from benches.vision.tokens import interval, overlaps
from PIL import Image

import nybble
from nybble.compress import compress
from nybble.runtime.encoder import ImageEncoder

Scores = npt.NDArray[np.float64]
Measure = Callable[[ImageEncoder], Scores]

METHODS = ("random_units", "magnitude_units", "cfsp", "flap", "refit")
SEEDS = 3
MEASURED = 48
_LOOKING = ("cfsp", "flap", "refit")
_COLUMNS = ("model", "method", "ratio", "removed", "score", "mean", "low", "high", "images")


def save(images: list[Image.Image], folder: Path) -> Path:
    """Write images where calibration reads them."""
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number:04}.png")
    return folder


def saliency(data: Path, folder: Path) -> tuple[list[Image.Image], str, Measure]:
    """Return what DINOv2 is calibrated with, what is measured of it, and how."""
    images = [image for _, image in pictures(data / "vision" / "imagenet_sample_200.zip", "")]
    shown = images[::3][:64]
    others = [image for number, image in enumerate(images) if number % 3]
    model, head = nybble.load(folder), Saliency(folder)
    pixels = model.preprocess(others[:: len(others) // MEASURED][:MEASURED])
    whole = maps(model, head, pixels)
    return shown, "overlap of maps", lambda small: overlaps(maps(small, head, pixels), whole)


def cifar(data: Path, folder: Path) -> tuple[list[Image.Image], str, Measure]:
    """Return the same of the CIFAR-10 model."""
    archive = data / "vision" / "cifar10_jpeg_train500_test500.zip"
    shown = [image for _, image in pictures(archive, "train/")][::2]
    images = pictures(archive, "test/")
    truth = np.array([CLASSES.index(name.split("/")[1]) for name, _ in images])
    pixels = nybble.load(folder).preprocess([image for _, image in images])

    def measure(small: ImageEncoder) -> Scores:
        logits = small.encode(pixels).logits
        assert logits is not None  # it has a classifier
        return (logits.argmax(1) == truth).astype(np.float64)

    return shown, "right", measure


MODELS = {"dinov2-saliency": saliency, "cifar10-vit": cifar}


def pruned(
    folder: Path, out: Path, images: Path, count: int, settings: dict[str, Any]
) -> tuple[ImageEncoder, float]:
    """Prune; return what is left, and the share of the layers' parameters that went."""
    recipe = {
        "prune": settings,
        "weights": {"bits": 16},
        "activations": {"bits": 16},
        "calibration": {"images": count},
        "floats": "f16",
    }
    looking = settings["name"] in _LOOKING
    report = compress(
        folder,
        out,
        recipe=recipe,
        calibration=[images] if looking else (),
        overwrite=True,
        progress=False,
    )
    assert report.prune is not None  # the recipe prunes
    return nybble.load(out), float(report.prune["achieved"]["share_of_layers"])


def compare(name: str, folder: Path, work: Path, arguments: argparse.Namespace) -> list[list[Any]]:
    """Measure the whole model and what every method leaves of it."""
    shown, score, measure = MODELS[name](arguments.data, folder)
    images = save(shown, work / f"{name}-images")
    rows: list[list[Any]] = []

    def add(method: str, ratio: float, removed: float, values: Scores) -> None:
        found = interval(values)
        print(f"  {method:16} {ratio:4.0%} {removed:6.1%}  {found}", flush=True)
        numbers = (found.mean, found.low, found.high)
        facts = [name, method, ratio, f"{removed:.4f}", score]
        rows.append([*facts, *(f"{number:.4f}" for number in numbers), len(values)])

    print(f"{name}: {score}, {len(shown)} images to calibrate with")
    add("whole", 0.0, 0.0, measure(nybble.load(folder)))
    for ratio in arguments.ratios:
        for method in arguments.methods:
            runs = []
            for seed in range(SEEDS if method == "random_units" else 1):
                settings = {"name": method, "ratio": ratio}
                settings |= {"seed": seed} if method == "random_units" else {}
                small, removed = pruned(folder, work / "out", images, len(shown), settings)
                runs.append(measure(small))
            add(method, ratio, removed, np.mean(runs, axis=0))
    return rows


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description="Compare methods that prune image encoders.")
    parser.add_argument("--onnx", type=Path, help="the DINOv2 saliency model")
    parser.add_argument("--data", type=Path, required=True, help="the folder with vision/, models/")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--ratios", default="0.1,0.2,0.3")
    parser.add_argument("--csv", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    arguments.methods = arguments.methods.split(",")
    arguments.ratios = [float(ratio) for ratio in arguments.ratios.split(",")]
    sources = {
        "cifar10-vit": arguments.data / "models" / "cifar10_vit_d128_l6_p4.pth",
        "dinov2-saliency": arguments.onnx,
    }
    rows: list[list[Any]] = []
    with TemporaryDirectory() as work:
        for name in arguments.models.split(","):
            if sources.get(name) is None:
                parser.error(f"{name}: expected a model there is, with its file")
            folder = Path(work) / name
            CONVERTERS[name](sources[name], folder)
            rows += compare(name, folder, Path(work), arguments)
    if arguments.csv:
        with arguments.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([_COLUMNS, *rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
