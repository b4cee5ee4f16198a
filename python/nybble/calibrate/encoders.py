"""transformers' image encoders, by the names that checkpoints have.

Files keep the names of a class's first versions, and the class may have others by now. Both are
brought to one form, in which each tensor finds its place whatever the version.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

__all__ = ["POST_NORM", "norms_behind", "paths", "run", "tower"]

POST_NORM = "vit_post_norm"
"""The ``model_type`` of a ViT with norms behind its blocks, which transformers does not have."""

_FORM = (
    (r"^(vit|deit|dinov2|dinov2_with_registers|vision_model)\.", ""),
    (r"^(encoder\.layers?|layers)\.", "layers."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attention.\1."),
    (r"\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
"""Older names and the newer ones of the same place, in the order in which they are tried."""


def tower(config: dict[str, Any]) -> Any:
    """Return the part of transformers' model that encodes images, with random weights.

    Parameters
    ----------
    config
        The configuration of an encoder, or of a model that has one beside a text tower.
    """
    from transformers import AutoConfig, AutoModel

    kind = str(config["model_type"])
    section = config.get("vision_config")
    if isinstance(section, dict):
        config = {"model_type": f"{kind}_vision_model", **section}
    left_out = ("dtype", "torch_dtype", "nybble", "model_type")
    settings = {key: value for key, value in config.items() if key not in left_out}
    name = "vit" if kind == POST_NORM else config["model_type"]
    return AutoModel.from_config(AutoConfig.for_model(name, **settings)).eval()


def paths(model: Any, tensors: Iterable[str]) -> dict[str, str]:
    """Return where a model has a checkpoint's tensors, by their names; others are left out."""
    known = {_form(path): path for path, _ in model.named_parameters()}
    return {name: known[_form(name)] for name in tensors if _form(name) in known}


def _form(name: str) -> str:
    for old, new in _FORM:
        name = re.sub(old, new, name)
    return name


def run(model: Any, pixels: Any) -> None:
    """Run the model on prepared images of any size that patches divide."""
    # DINOv2's classes fit positions to the image without being told to.
    told = not str(model.config.model_type).startswith("dinov2")
    model(pixel_values=pixels, **({"interpolate_pos_encoding": True} if told else {}))


def norms_behind(layer: Any, up: Any, down: Any, activation: str) -> None:
    """Make a ViT's layer one with norms behind its blocks.

    Parameters
    ----------
    layer
        The layer, whose weights it keeps.
    up, down
        The linears of its feed-forward block.
    activation
        What is between them, as transformers calls it.
    """
    from transformers.activations import ACT2FN

    between = ACT2FN[activation]

    def forward(hidden: Any, *_: Any, **__: Any) -> Any:
        attended = layer.attention(hidden)
        attended = attended[0] if isinstance(attended, tuple) else attended
        hidden = layer.layernorm_before(hidden + attended)
        return layer.layernorm_after(hidden + down(between(up(hidden))))

    layer.forward = forward
