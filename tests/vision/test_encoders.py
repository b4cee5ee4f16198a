"""Every family of image encoders computes what transformers computes."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import nybble
from nybble.compress import compress
from nybble.errors import ArgumentError, ConfigError, FormatError, UnsupportedError
from vision.encoders import ENCODERS, SIZES, reference, save

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]
BOUND = 1e-4


def pixels(images, height=24, width=24, seed=0):
    numbers = np.random.default_rng(seed)
    return numbers.standard_normal((images, 3, height, width)).astype(np.float32)


def distance(found, wanted):
    """The relative error of the whole array."""
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", ENCODERS)
def test_tokens_embedding_and_scores(name, tmp_path):
    model = save(name, tmp_path)
    ours = nybble.load(tmp_path, threads=2)
    sizes = [(24, 24)]
    if name != "clip-classifier":  # transformers' has no way to interpolate
        sizes += [(32, 20), (12, 48)]
    for height, width in sizes:
        values = pixels(3, height, width)
        tokens, embedding, logits = reference(model, values)
        found = ours.encode(values)
        assert distance(found.tokens, tokens) < BOUND
        assert distance(found.embedding, embedding) < BOUND
        assert found.grid == (height // 4, width // 4)
        assert found.patches.shape == (3, height // 4, width // 4, SIZES["hidden_size"])
        if logits is None:
            assert found.logits is None
        else:
            assert distance(found.logits, logits) < BOUND


@pytest.mark.parametrize("name", ["deit-teacher", "dinov2-registers", "clip", "siglip"])
def test_an_image_does_not_depend_on_its_neighbours_or_threads(name, tmp_path):
    save(name, tmp_path)
    values = pixels(40)  # more than are computed together
    many = nybble.load(tmp_path, threads=2).encode(values)
    one = nybble.load(tmp_path, threads=1)
    for index in (0, 1, 26, 27, 28, 39):
        alone = one.encode(values[index : index + 1])
        assert np.array_equal(alone.tokens[0], many.tokens[index])
        assert np.array_equal(alone.embedding[0], many.embedding[index])
    # A grid used before leaves nothing behind.
    other = pixels(1, 32, 32)
    first = one.encode(other).embedding
    one.encode(pixels(1, 12, 12))
    assert np.array_equal(one.encode(other).embedding, first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_half_precision_weights(name, dtype, tmp_path):
    model = save(name, tmp_path)
    model.to(dtype).save_pretrained(tmp_path)
    wanted = reference(model.float(), pixels(2))
    found = nybble.load(tmp_path, threads=2).encode(pixels(2))
    assert distance(found.embedding, wanted[1]) < BOUND


#: Largest relative errors of the embedding: of random weights, which are harder than trained ones.
SCHEMES = {
    "w8a8": ({"weights": {"bits": 8}, "activations": {"bits": 8}}, 0.02),
    "w4a8": ({"weights": {"bits": 4}, "activations": {"bits": 8}}, 0.25),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "clip", "siglip-classifier"])
def test_compressed_folders(name, scheme, tmp_path):
    recipe, bound = SCHEMES[scheme]
    save(name, tmp_path / "source")
    report = compress(tmp_path / "source", tmp_path / "out", recipe=recipe, progress=False)
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    assert report.family == json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    ours, original = nybble.load(tmp_path / "out", threads=2), nybble.load(tmp_path / "source")
    assert ours.info["weight_bytes"].keys() & {"w4", "w8"}
    found, wanted = ours.encode(pixels(4)), original.encode(pixels(4))
    assert 1e-5 < distance(found.embedding, wanted.embedding) < bound
    assert distance(found.tokens, wanted.tokens) < bound
    # Rounded or not, images do not see each other.
    alone = ours.encode(pixels(4)[2:3])
    assert np.array_equal(alone.tokens[0], found.tokens[2])


def test_a_compressed_folder_computes_with_its_own_weights(tmp_path):
    """What the run-time makes of an 8-bit folder is what the rounded weights would make."""
    model = save("vit", tmp_path / "source")
    recipe = {"weights": {"bits": 8, "group": None}, "activations": {"bits": 16}, "floats": "bf16"}
    compress(tmp_path / "source", tmp_path / "out", recipe=recipe, progress=False)
    stored = nybble._nybble.Checkpoint.open(tmp_path / "out")
    original = load_file(tmp_path / "source" / "model.safetensors")
    for module in json.loads(stored.plan())["linears"]:
        name = module["module"]
        packed = np.frombuffer(stored.raw(f"{name}.weight_packed"), dtype=np.uint8)
        codes = packed.reshape(module["rows"], -1)[:, : module["cols"]].astype(np.float32) - 128
        original[f"{name}.weight"] = codes * stored.read(f"{name}.weight_scale").reshape(-1, 1)
    for name in original:
        if name in stored.tensors() and original[name].ndim > 1:
            original[name] = stored.read(name).reshape(original[name].shape)
    save_file(original, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    wanted = reference(type(model).from_pretrained(tmp_path / "source").eval(), pixels(2))
    found = nybble.load(tmp_path / "out", threads=2, kv="f32").encode(pixels(2))
    assert distance(found.logits, wanted[2]) < BOUND


def test_what_cannot_be_compressed_that_way(tmp_path):
    save("vit", tmp_path / "source")
    (tmp_path / "text.txt").write_text("a text")
    for recipe in ({"weights": {"bits": 4, "method": "gptq"}}, {"tokens": {"ratio": 0.3}}):
        with pytest.raises(UnsupportedError, match="image encoders"):
            compress(tmp_path / "source", tmp_path / "out", recipe=recipe, progress=False)
    assert not (tmp_path / "out").exists()


def test_sizes_that_cannot_be(tmp_path):
    save("vit", tmp_path)
    model = nybble.load(tmp_path, threads=1)
    for shape in [(1, 3, 22, 24), (1, 3, 24, 2), (1, 3, 0, 24), (1, 1, 24, 24), (1, 3, 24, 25)]:
        with pytest.raises(ArgumentError, match="pixel values"):
            model.encode(np.zeros(shape, np.float32))
    with pytest.raises(ArgumentError, match="float32"):
        model.encode(np.zeros((1, 3, 24, 24)))
    with pytest.raises(ArgumentError, match="size"):
        model.encode(pixels(1), size=24)
    nothing = model.encode(np.zeros((0, 3, 24, 24), np.float32))
    assert nothing.tokens.size == 0
    assert nothing.logits.shape == (0, 7)
    values = pixels(1)
    assert np.array_equal(
        model.encode(np.asfortranarray(values)).tokens, model.encode(values).tokens
    )


def test_weights_of_another_architecture(tmp_path):
    save("vit", tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for change, word in [
        (
            {"hidden_size": 60},
            r"layer\.0.*query.weight: expected shape \[60, 60\], found \[48, 48\]",
        ),
        ({"num_hidden_layers": 4}, "layer.3"),
        ({"image_size": 32}, "position_embeddings"),
        ({"patch_size": 8}, "projection.weight"),
        ({"model_type": "dinov2"}, "dinov2.encoder.layer.0"),
        ({"model_type": "siglip_vision_model"}, "vision_model.head.attention.out_proj"),
        ({"image_size": 2}, "patch_size"),
        ({"hidden_act": "sin"}, "hidden_act"),
    ]:
        file.write_text(json.dumps({**config, **change}))
        with pytest.raises(ConfigError, match=word):
            nybble.load(tmp_path)
    file.write_text(json.dumps({**config, "nybble": {"version": 1, "run": {"tokens": {}}}}))
    with pytest.raises(UnsupportedError, match="image encoder"):
        nybble.load(tmp_path)
    file.write_text(json.dumps({**config, "vision_config": 7, "model_type": "clip"}))
    with pytest.raises(FormatError, match="vision_config"):
        nybble.load(tmp_path)


def test_the_two_kinds_of_models_are_told_apart(tmp_path, tiny_folder):
    save("vit", tmp_path)
    with pytest.raises(UnsupportedError, match="image encoder"):
        nybble.NybbleForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="language model"):
        nybble.ImageEncoder.from_pretrained(tiny_folder)
    with pytest.raises(ArgumentError, match="context"):
        nybble.load(tmp_path, context=7)
    assert isinstance(nybble.load(tmp_path), nybble.ImageEncoder)
    assert isinstance(nybble.load(tiny_folder), nybble.LanguageModel)


def test_labels_and_classes(tmp_path):
    save("vit", tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    names = {str(i): f"thing {i}" for i in range(6)} | {"6": "last"}
    file.write_text(json.dumps({**config, "id2label": names}))
    model = nybble.load(tmp_path)
    values = pixels(2)
    logits = model.encode(values).logits
    best = model.classify(values, top=3)
    assert [len(row) for row in best] == [3, 3]
    for row, scores in zip(best, logits, strict=True):
        shares = np.exp(scores) / np.exp(scores).sum()
        assert [guess.index for guess in row] == list(np.argsort(-scores)[:3])
        assert row[0].label == names[str(row[0].index)]
        assert row[0].score == pytest.approx(shares.max(), rel=1e-5)
    save("clip", tmp_path / "clip")
    with pytest.raises(UnsupportedError, match="no classifier"):
        nybble.load(tmp_path / "clip").classify(values)
