"""Turn the two published image models into Hugging Face folders in float32.

Usage::

    python -m benches.vision.models dinov2-saliency vit_s_focus.onnx OUT
    python -m benches.vision.models cifar10-vit cifar10_vit_d128_l6_p4.pth OUT

``dinov2-saliency`` is a DINOv2 small of patch 14, trained on for saliency, inside an ONNX file with
a small head of transposed convolutions; the encoder becomes a ``dinov2`` folder, the head's tensors
``head.safetensors`` beside it, which :class:`Saliency` computes with torch. ``cifar10-vit`` is made
of PyTorch's own ``TransformerEncoderLayer``, with norms behind the blocks: a ``vit_post_norm``
folder, which transformers does not know.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

Floats = npt.NDArray[np.float32]

#: CIFAR-10's classes in its order.
CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]
_LAYER = re.compile(r"/backbone/(encoder/layer\.\d+/.*)/MatMul$")


def write(
    folder: Path, config: dict[str, Any], tensors: dict[str, Floats], **settings: Any
) -> None:
    """Write weights, configuration and how images are prepared."""
    folder.mkdir(parents=True)
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"do_resize": True, "do_rescale": True, "do_normalize": True, **settings}
    for name, value in [("config.json", config), ("preprocessor_config.json", settings)]:
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def dinov2_saliency(file: Path, out: Path) -> None:
    """Take the encoder and the head out of the ONNX file."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    tensors, head = {}, {}
    for name, value in found.items():
        if name.startswith("backbone."):
            tensors[name.removeprefix("backbone.")] = value
        elif name.startswith("decoder."):
            head[name.removeprefix("decoder.")] = value
    for node in graph.node:
        weights = [found[name] for name in node.input if name in found]
        # Matrices lost their names; the nodes that multiply by them did not, nor their order.
        if node.op_type == "MatMul" and weights and (place := _LAYER.match(node.name)):
            tensors[f"{place[1].replace('/', '.')}.weight"] = weights[0].T
        elif node.name == "/backbone/embeddings/Reshape_1":
            patches = weights[0]
        elif node.name == "/backbone/embeddings/Concat_6":
            tensors["embeddings.position_embeddings"] = np.concatenate(
                [weights[0], patches], axis=1
            )
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder."))
    hidden = tensors["embeddings.cls_token"].shape[-1]
    _, positions, _ = tensors["embeddings.position_embeddings"].shape
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "mlp_ratio": 4,
        "patch_size": 14,
        "image_size": 14 * int((positions - 1) ** 0.5),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "use_mask_token": False,
        "dtype": "float32",
    }
    write(
        out,
        config,
        tensors,
        image_processor_type="BitImageProcessor",
        size={"height": 224, "width": 224},
        resample=2,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    contiguous = {name: np.ascontiguousarray(value) for name, value in head.items()}
    save_file(contiguous, out / "head.safetensors", metadata={"format": "pt"})


def cifar10_vit(file: Path, out: Path) -> None:
    """Take apart the state of PyTorch's encoder layers."""
    import torch

    state = {
        name: value.numpy()
        for name, value in torch.load(file, map_location="cpu", weights_only=True).items()
    }
    tensors = {
        "vit.embeddings.cls_token": state["cls_token"],
        "vit.embeddings.position_embeddings": state["pos_embed"],
        "vit.embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "vit.embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
    }
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("transformer."))
    for layer in range(layers):
        at, to = f"transformer.layers.{layer}", f"vit.encoder.layer.{layer}"
        for kind in ("weight", "bias"):
            stacked = np.split(state[f"{at}.self_attn.in_proj_{kind}"], 3)
            for part, value in zip(("query", "key", "value"), stacked, strict=True):
                tensors[f"{to}.attention.attention.{part}.{kind}"] = value
            for theirs, ours in (
                ("self_attn.out_proj", "attention.output.dense"),
                ("linear1", "intermediate.dense"),
                ("linear2", "output.dense"),
                ("norm1", "layernorm_before"),
                ("norm2", "layernorm_after"),
            ):
                tensors[f"{to}.{ours}.{kind}"] = state[f"{at}.{theirs}.{kind}"]
    for kind in ("weight", "bias"):
        tensors[f"vit.layernorm.{kind}"] = state[f"mlp_head.0.{kind}"]
        tensors[f"classifier.{kind}"] = state[f"mlp_head.1.{kind}"]
    hidden = tensors["vit.embeddings.cls_token"].shape[-1]
    config = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit_post_norm",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "intermediate_size": tensors["vit.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "patch_size": 4,
        "image_size": 32,
        "hidden_act": "relu",
        "layer_norm_eps": 1e-5,
        "id2label": {str(index): name for index, name in enumerate(CLASSES)},
        "dtype": "float32",
    }
    write(
        out,
        config,
        tensors,
        image_processor_type="ViTImageProcessor",
        size={"height": 32, "width": 32},
        resample=2,
        image_mean=[0.4914, 0.4822, 0.4465],
        image_std=[0.2023, 0.1994, 0.2010],
    )


class Saliency:
    """The head of ``dinov2-saliency``: three transposed convolutions, on torch.

    Parameters
    ----------
    folder
        The converted folder.
    """

    def __init__(self, folder: Path) -> None:
        import torch

        self.state = {
            name: torch.from_numpy(value)
            for name, value in load_file(folder / "head.safetensors").items()
        }

    def __call__(self, patches: Floats, size: tuple[int, int]) -> Floats:
        """Return maps ``[images, height, width]`` from 0 to 1.

        Parameters
        ----------
        patches
            The encoder's tokens, ``[images, rows, columns, hidden]``.
        size
            Height and width of the maps.
        """
        import torch
        from torch.nn import functional

        state = self.state
        x = torch.from_numpy(np.ascontiguousarray(patches)).permute(0, 3, 1, 2)
        with torch.no_grad():
            for step in ("1", "2", "3"):
                weight, bias = state[f"upconv{step}.weight"], state[f"upconv{step}.bias"]
                x = functional.conv_transpose2d(x, weight, bias, stride=2, padding=1)
                mean, variance, gain, offset = (
                    state[f"bn{step}.{part}"]
                    for part in ("running_mean", "running_var", "weight", "bias")
                )
                x = functional.batch_norm(x, mean, variance, gain, offset).relu()
            x = functional.conv2d(x, state["final_conv.weight"], state["final_conv.bias"])
            x = functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
            return x.sigmoid()[:, 0].numpy()


CONVERTERS = {"dinov2-saliency": dinov2_saliency, "cifar10-vit": cifar10_vit}


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description="Convert a published image model.")
    parser.add_argument("model", choices=CONVERTERS)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists")
    CONVERTERS[arguments.model](arguments.file, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
