"""The converters of the published image models, on tiny random ones of the same form."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nybble

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def vision():
    """The package, which is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        import benches.vision.engines
        import benches.vision.models
        import benches.vision.parity
        import benches.vision.prune
        import benches.vision.speed
        import benches.vision.tokens

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


def test_every_patch_gets_features(vision, tmp_path):
    torch.save(state(), tmp_path / "model.pth")
    vision.models.cifar10_vit(tmp_path / "model.pth", tmp_path / "folder")
    model = nybble.load(tmp_path / "folder", threads=2)
    pixels = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    full_grid = vision.tokens.full_grid
    dense = model.encode(pixels)
    assert np.array_equal(full_grid(dense), dense.patches)
    merged = model.encode(pixels, tokens={"name": "tome", "layers": [0, 2], "r": 9})
    left = model.encode(pixels, tokens={"name": "random", "layers": [1], "keep": 0.4})
    for found in (merged, left):
        grid = full_grid(found).reshape(3, 64, -1)
        for image in range(3):
            for patch, owner in enumerate(found.owners[image]):
                if owner < 2**32 - 1:
                    assert np.array_equal(grid[image, patch], found.tokens[image, 1 + owner])
                else:
                    assert (found.tokens[image, 1:] == grid[image, patch]).all(axis=1).any()


def test_intervals_and_overlaps(vision):
    tokens = vision.tokens
    same = tokens.interval(np.full(50, 0.25))
    assert (same.mean, same.low, same.high) == (0.25, 0.25, 0.25)
    values = np.random.default_rng(0).standard_normal(400)
    found = tokens.interval(values)
    assert found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(4 * values.std() / 20, rel=0.1)
    a = np.zeros((2, 4, 4), np.float32)
    b = a.copy()
    a[0, :2], b[0, 1:3] = 1, 1
    assert tokens.overlaps(a, b).tolist() == [1 / 3, 1]


@pytest.mark.parametrize("method", ["random", "zero_tprune", "tome"])
def test_schedules_of_a_cost(vision, method, tmp_path):
    torch.save(state(), tmp_path / "model.pth")
    vision.models.cifar10_vit(tmp_path / "model.pth", tmp_path / "folder")
    model = nybble.load(tmp_path / "folder", threads=2)
    tokens = vision.engines.schedule(model, 32, method, 0.3)
    assert 1 - model.macs(32, tokens) / model.macs(32) == pytest.approx(0.3, abs=0.04)


def test_norms_behind_the_blocks_are_pruned(vision, tmp_path):
    torch.save(state(), tmp_path / "model.pth")
    vision.models.cifar10_vit(tmp_path / "model.pth", tmp_path / "folder")
    numbers = np.random.default_rng(0)
    pictures = [
        Image.fromarray(numbers.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(6)
    ]
    images = vision.prune.save(pictures, tmp_path / "images")
    dense = nybble.load(tmp_path / "folder", threads=2)
    pixels = dense.preprocess(pictures)
    lost = {}
    for method in ("random_units", "refit"):
        settings = {"name": method, "ratio": 0.2, "round_to": 8}
        small, removed = vision.prune.pruned(
            tmp_path / "folder", tmp_path / "out", images, 6, settings
        )
        assert removed == pytest.approx(0.2, abs=0.05)
        tokens = small.encode(pixels).tokens
        lost[method] = vision.parity.relative(tokens, dense.encode(pixels).tokens)
    assert 0 < lost["refit"] < lost["random_units"]


def test_times_are_kept(vision, tmp_path):
    header = {"threads": 2}
    times = vision.speed.Times(tmp_path / "times", header)
    times.add(("nybble f32", 224, 1), 7, None)
    times.add(("nybble f32", 224, 1), 9, 2)
    again = vision.speed.Times(tmp_path / "times", header)
    assert again.found == {("nybble f32", 224, 1): [7, 9]}
    assert vision.speed.Times(tmp_path / "times", {"threads": 1}).found == {}
