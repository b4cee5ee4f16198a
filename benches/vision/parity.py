"""Do the converted models compute what other engines make of them, and what does rounding cost?

Usage::

    python -m benches.vision.parity --onnx vit_s_focus.onnx --data DATA [--images N] [--json FILE]

Compares, on the sample images of ``DATA/vision``:

* DINOv2-S in float32 with transformers (relative error of the last hidden states) and, through the
  saliency head, with the ONNX file run by onnxruntime (largest difference of the maps);
* the CIFAR-10 model in float32 with PyTorch's own layers (relative error of the scores);
* each compressed scheme with float32: intersection over union of the regions more salient than a
  half, averaged over images, and classes of CIFAR-10 guessed right.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from benches.vision.models import CLASSES, Saliency, cifar10_vit, dinov2_saliency
from PIL import Image

import nybble
from nybble.compress import compress

Floats = npt.NDArray[np.float32]

#: Recipes of the compressed folders.
SCHEMES = ("w8a8", "w7a7", "w4a8")
_STEP = 8


def pictures(archive: Path, name: str, count: int | None = None) -> list[tuple[str, Image.Image]]:
    """Return the archive's JPEG files below `name`, in order."""
    with zipfile.ZipFile(archive) as files:
        names = [n for n in sorted(files.namelist()) if n.startswith(name) and n.endswith(".jpg")]
        return [(n, Image.open(io.BytesIO(files.read(n))).convert("RGB")) for n in names[:count]]


def relative(found: Floats, wanted: Floats) -> float:
    """Return the relative error of the whole array."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def overlap(found: Floats, wanted: Floats) -> float:
    """Return the mean intersection over union of what is above a half; 1 where neither has any."""
    a, b = found > 0.5, wanted > 0.5
    union = (a | b).sum(axis=(1, 2))
    shared = (a & b).sum(axis=(1, 2))
    return float(np.mean(np.where(union > 0, shared / np.maximum(union, 1), 1.0)))


def torch_cifar(file: Path, pixels: Floats) -> Floats:
    """Return the scores of PyTorch's own layers."""
    import torch
    from torch import nn

    state = torch.load(file, map_location="cpu", weights_only=True)
    width = state["cls_token"].shape[-1]
    inner = state["transformer.layers.0.linear1.weight"].shape[0]
    layer = nn.TransformerEncoderLayer(width, 8, inner, batch_first=True)
    stack = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    part = {k.removeprefix("transformer."): v for k, v in state.items() if "layers." in k}
    stack.load_state_dict(part)
    stack.eval()
    with torch.no_grad():
        weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
        x = nn.functional.conv2d(torch.from_numpy(pixels), weight, bias, stride=4)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
        x = stack(x)[:, 0]
        x = nn.functional.layer_norm(
            x, (width,), state["mlp_head.0.weight"], state["mlp_head.0.bias"]
        )
        logits: Floats = nn.functional.linear(
            x, state["mlp_head.1.weight"], state["mlp_head.1.bias"]
        ).numpy()
    return logits


def maps(model: nybble.ImageEncoder, head: Saliency, pixels: Floats) -> Floats:
    """Return the saliency maps of prepared images."""
    found = []
    for start in range(0, len(pixels), _STEP):
        part = pixels[start : start + _STEP]
        found.append(head(model.encode(part).patches, part.shape[2:]))
    return np.concatenate(found)


def saliency(onnx: Path, data: Path, work: Path, count: int) -> dict[str, Any]:
    """Measure the DINOv2 model."""
    import onnxruntime
    import torch
    from transformers import Dinov2Model

    folder = work / "dinov2"
    dinov2_saliency(onnx, folder)
    model, head = nybble.load(folder), Saliency(folder)
    archive = data / "vision" / "imagenet_sample_200.zip"
    pixels = model.preprocess([image for _, image in pictures(archive, "", count)])
    theirs = Dinov2Model.from_pretrained(folder).eval()
    some = pixels[:_STEP]
    with torch.no_grad():
        states = theirs(torch.from_numpy(some)).last_hidden_state.numpy()
    wanted = maps(model, head, pixels)
    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    reference = np.concatenate(
        [session.run(None, {"input_image": image[None]})[0][:, 0] for image in some]
    )
    found: dict[str, Any] = {
        "images": len(pixels),
        "f32: hidden states against transformers, relative": relative(
            model.encode(some).tokens, states
        ),
        "f32: maps against onnxruntime, largest difference": float(
            np.abs(wanted[: len(some)] - reference).max()
        ),
        "f32: maps against onnxruntime, relative": relative(wanted[: len(some)], reference),
    }
    for name in SCHEMES:
        compress(folder, work / f"dinov2-{name}", recipe=name, progress=False)
        small = maps(nybble.load(work / f"dinov2-{name}"), head, pixels)
        found[f"{name}: IoU of maps with f32"] = overlap(small, wanted)
    return found


def cifar(file: Path, data: Path, work: Path) -> dict[str, Any]:
    """Measure the CIFAR-10 model."""
    folder = work / "cifar"
    cifar10_vit(file, folder)
    model = nybble.load(folder)
    images = pictures(data / "vision" / "cifar10_jpeg_train500_test500.zip", "test/")
    truth = np.array([CLASSES.index(name.split("/")[1]) for name, _ in images])
    pixels = model.preprocess([image for _, image in images])
    scores = model.encode(pixels).logits
    found = {
        "images": len(images),
        "f32: scores against torch, relative": relative(scores, torch_cifar(file, pixels)),
        "f32: right": float((scores.argmax(1) == truth).mean()),
    }
    for name in SCHEMES:
        compress(folder, work / f"cifar-{name}", recipe=name, progress=False)
        small = nybble.load(work / f"cifar-{name}").encode(pixels).logits
        found[f"{name}: right"] = float((small.argmax(1) == truth).mean())
        found[f"{name}: the class of f32"] = float((small.argmax(1) == scores.argmax(1)).mean())
    return found


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description="Compare image models with other engines.")
    parser.add_argument("--onnx", type=Path, required=True, help="the DINOv2 saliency model")
    parser.add_argument("--data", type=Path, required=True, help="the folder with vision/, models/")
    parser.add_argument("--images", type=int, default=200, help="ImageNet samples to use")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    checkpoint = arguments.data / "models" / "cifar10_vit_d128_l6_p4.pth"
    with TemporaryDirectory() as work:
        found = {
            "DINOv2-S saliency": saliency(
                arguments.onnx, arguments.data, Path(work), arguments.images
            ),
            "CIFAR-10 ViT": cifar(checkpoint, arguments.data, Path(work)),
        }
    for model, figures in found.items():
        print(model)
        for name, value in figures.items():
            print(f"  {name}: {value:.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
