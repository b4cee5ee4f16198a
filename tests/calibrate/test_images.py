"""Images to calibrate with, and encoders walked through layer by layer."""

import hashlib
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from nybble import _nybble
from nybble.calibrate.images import draw
from nybble.errors import ArgumentError, FormatError, MissingFileError, UnsupportedError
from nybble.runtime.images import ImageProcessor
from vision.encoders import ENCODERS, save
from walks import output_of, run_both_ways, walk_of

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

PLAIN = ImageProcessor(resize=(8, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten images in two folders, and what is none."""
    root = tmp_path_factory.mktemp("images") / "photos"
    numbers = np.random.default_rng(0)
    for index in range(10):
        place = root / ("cats" if index % 2 else "dogs") / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (9, 14, 3), dtype=np.uint8)).save(place)
    (root / "labels.txt").write_text("cat dog")
    (root / "cats" / "._1.png").write_bytes(b"what a Mac writes beside a file")
    return root


@pytest.fixture(scope="module")
def archive(folder, tmp_path_factory):
    """The same in a zip archive."""
    path = tmp_path_factory.mktemp("zip") / "photos.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for file in sorted(folder.rglob("*")):
            out.write(file, file.relative_to(folder))
    return path


def test_a_seed_decides_the_images(folder, archive):
    found = draw([folder], PLAIN, images=4, seed=0)
    assert found.windows.shape == (4, 3, 8, 12)
    assert found.windows.dtype == np.float32
    for number, (name, digest) in enumerate(found.files.items()):
        file = folder.parent / name
        assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
        np.testing.assert_array_equal(found.windows[number], PLAIN(file))
    again = draw([folder], PLAIN, images=4, seed=0)
    assert (again.digest, again.to_json()) == (found.digest, found.to_json())
    other = draw([folder], PLAIN, images=4, seed=1)
    assert other.digest != found.digest
    everything = draw([folder], PLAIN, images=10, seed=3)
    assert len(set(everything.files)) == 10
    packed = draw([archive], PLAIN, images=4, seed=0)
    assert packed.digest == found.digest
    assert sorted(packed.files.values()) == sorted(found.files.values())
    files = sorted(folder.rglob("[0-9].png"))
    assert draw(files, PLAIN, images=4, seed=0).digest == found.digest
    facts = found.to_json()
    assert (facts["images"], facts["size"], facts["seed"]) == (4, [8, 12], 0)


def test_what_is_not_enough_is_told(folder, archive, tmp_path):
    def fails(error, words, *paths, images=1, processor=PLAIN, patch=1):
        with pytest.raises(error, match=words):
            draw(paths, processor, images=images, seed=0, patch=patch)

    fails(
        ArgumentError, "photos: expected 11 images to calibrate with, found 10", folder, images=11
    )
    fails(ArgumentError, "calibration images: expected at least 1, found 0", folder, images=0)
    fails(ArgumentError, "expected an image .* in patches of 5; found 8 x 12", folder, patch=5)
    shorter = ImageProcessor(resize=8)
    odd = tmp_path / "odd.png"
    Image.new("RGB", (30, 10)).save(odd)
    files = [odd, folder / "dogs" / "0.png"]
    fails(ArgumentError, "size of the others", *files, images=2, processor=shorter)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no picture")
    fails(
        ArgumentError, "texts: expected a folder with images .* found 1 files", tmp_path / "texts"
    )
    fails(ArgumentError, "a.txt: expected images .* ends in .txt", tmp_path / "texts" / "a.txt")
    fails(MissingFileError, "nowhere: no such file", tmp_path / "nowhere")
    fails(MissingFileError, "nowhere.zip", tmp_path / "nowhere.zip")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG and nothing else")
    fails(FormatError, "bad.png: expected", tmp_path / "bad.png")
    (tmp_path / "bad.zip").write_bytes(b"PK no archive")
    fails(FormatError, "bad.zip: expected a zip archive", tmp_path / "bad.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as out:
        out.writestr("a.txt", "no picture")
    fails(ArgumentError, "empty.zip: expected an archive with images", tmp_path / "empty.zip")
    damaged = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as whole:
        start = whole.getinfo("cats/1.png").header_offset + 100
    damaged[start : start + 30] = bytes(30)
    (tmp_path / "damaged.zip").write_bytes(damaged)
    fails(FormatError, "damaged.zip", tmp_path / "damaged.zip", images=10)


@pytest.fixture
def opened(tmp_path):
    """Return a function that saves an encoder and opens it for a walk."""

    def open_encoder(name):
        model = save(name, tmp_path / name)
        return model, walk_of(tmp_path / name)

    return open_encoder


def last_states(model, walk, pixels):
    """What the last layer gives when transformers runs the model."""
    for part in ("vit", "deit", "dinov2", "dinov2_with_registers", "vision_model"):
        model = getattr(model, part, model)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    last = next(stack for stack in layers if len(stack) == len(walk))[-1]
    dino = type(model).__name__.startswith("Dinov2")
    told = {} if dino else {"interpolate_pos_encoding": True}
    return output_of(last, lambda: model(torch.from_numpy(pixels), **told))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("size", [(24, 24), (20, 32)])
def test_a_walk_is_the_encoders_forward_pass(opened, name, size):
    model, walk = opened(name)
    pixels = np.random.default_rng(0).standard_normal((3, 3, *size)).astype(np.float32)
    plain = walk.embed(pixels)
    staged = [states.clone() for states in plain]
    for index in range(len(walk)):
        layer = walk.layer(index)
        assert set(layer.parameters) <= set(walk._shapes)
        run_both_ways(layer, plain, staged)
        assert {p.device.type for p in layer.parameters.values()} == {"cpu"}
        walk.drop(index)
        assert {p.device.type for p in layer.parameters.values()} == {"meta"}
    wanted = last_states(model, walk, pixels)
    for states in (plain, staged):
        assert (torch.cat(states) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_what_encoding_does_without_may_be_missing(opened, tmp_path):
    _, walk = opened("dinov2")
    pixels = np.random.default_rng(0).standard_normal((1, 3, 24, 24)).astype(np.float32)
    (wanted,) = walk.embed(pixels)
    tensors = load_file(tmp_path / "dinov2" / "model.safetensors")
    del tensors["dinov2.embeddings.mask_token"]
    save_file(tensors, tmp_path / "dinov2" / "model.safetensors", metadata={"format": "pt"})
    (found,) = walk_of(tmp_path / "dinov2").embed(pixels)
    assert torch.equal(found, wanted)


def test_norms_behind_the_blocks(opened, tmp_path):
    """Against PyTorch's own layers, which are what such a model is."""
    opened("vit-bare")  # ReLU
    file = tmp_path / "vit-bare" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "model_type": "vit_post_norm"}))
    walk = walk_of(tmp_path / "vit-bare")
    pixels = np.random.default_rng(0).standard_normal((2, 3, 24, 24)).astype(np.float32)
    hidden = walk.embed(pixels)
    first = torch.cat(hidden)
    layer = walk.layer(0)
    theirs = torch.nn.TransformerEncoderLayer(
        48, 3, 80, dropout=0.0, layer_norm_eps=config["layer_norm_eps"], batch_first=True
    ).eval()

    def stored(name, leaf="weight"):
        return torch.from_numpy(checkpoint.read(f"{name}.{leaf}").reshape(-1))

    checkpoint = _nybble.Checkpoint.open(str(tmp_path / "vit-bare"))
    attention, mlp = walk.plan["layers"][0]["attention"], walk.plan["layers"][0]["mlp"]
    prefix = walk.prefixes[0]
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(
            torch.cat([stored(name) for name in attention["qkv"]]).view(144, 48)
        )
        theirs.self_attn.in_proj_bias.zero_()
        for module, name in (
            (theirs.self_attn.out_proj, attention["out"]),
            (theirs.linear1, mlp["up"]),
            (theirs.linear2, mlp["down"]),
            (theirs.norm1, f"{prefix}.layernorm_before"),
            (theirs.norm2, f"{prefix}.layernorm_after"),
        ):
            module.weight.copy_(stored(name).view(module.weight.shape))
            module.bias.copy_(stored(name, "bias"))
        wanted = theirs(first)
    for window, _, output in layer.trace(hidden):
        torch.testing.assert_close(output[0], wanted[window], rtol=1e-4, atol=1e-5)


def test_a_layer_that_transformers_does_not_have(opened, monkeypatch):
    monkeypatch.setattr("nybble.calibrate.encoders._FORM", ())
    with pytest.raises(UnsupportedError, match=r"layer\.0: this version of transformers"):
        opened("vit")
