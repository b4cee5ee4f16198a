"""The converters of the published image models, on tiny random ones of the same form."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import nybble

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def vision():
    """The package, which is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        import benches.vision.models
        import benches.vision.parity

        yield benches.vision


def state(width=32, inner=48, layers=6):
    """The state of a model like the CIFAR-10 one, with its 8 heads and 6 layers."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(width, 8, inner, batch_first=True)
    stack = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    tensors = {f"transformer.{name}": value for name, value in stack.state_dict().items()}
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 65, width),
        "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,),
        "mlp_head.0.weight": (width,),
        "mlp_head.0.bias": (width,),
        "mlp_head.1.weight": (10, width),
        "mlp_head.1.bias": (10,),
    }
    tensors |= {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    return {name: value + 0.05 * torch.randn(value.shape) for name, value in tensors.items()}


def test_norms_behind_the_blocks(vision, tmp_path):
    torch.save(state(), tmp_path / "model.pth")
    vision.models.cifar10_vit(tmp_path / "model.pth", tmp_path / "folder")
    model = nybble.load(tmp_path / "folder", threads=2)
    assert model.labels == tuple(vision.models.CLASSES)
    pixels = np.random.default_rng(0).standard_normal((5, 3, 32, 32)).astype(np.float32)
    wanted = vision.parity.torch_cifar(tmp_path / "model.pth", pixels)
    assert vision.parity.relative(model.encode(pixels).logits, wanted) < 1e-5
    # Read as a plain ViT, with norms before the blocks, it is another function.
    file = tmp_path / "folder" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "model_type": "vit"}))
    other = nybble.load(tmp_path / "folder", threads=2).encode(pixels).logits
    assert vision.parity.relative(other, wanted) > 0.1


def test_overlap_of_maps(vision):
    overlap = vision.parity.overlap
    a = np.zeros((2, 2, 2), np.float32)
    b = a.copy()
    a[0, 0] = 1  # two of four pixels
    b[0, :, 0] = 1  # two, of which one is the same
    assert overlap(a, b) == pytest.approx((1 / 3 + 1) / 2)
    assert overlap(a, a) == 1
