"""`nybble classify`, `nybble embed`, and the other verbs on an image encoder."""

import json

import numpy as np
import pytest
from PIL import Image

import nybble
from nybble.cli.app import main
from vision.encoders import save


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("vision") / "vit"
    place.mkdir()
    save("vit", place, crop=True)
    return place


@pytest.fixture
def pictures(tmp_path):
    numbers = np.random.default_rng(0)
    paths = []
    for index in range(2):
        path = tmp_path / f"{index}.png"
        Image.fromarray(numbers.integers(0, 256, (40, 30 + index, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return paths


def test_classify(folder, pictures, capsys):
    assert main(["classify", str(folder), *pictures, "--top", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["images"]
    wanted = nybble.load(folder).classify(pictures, top=2)
    assert [image["path"] for image in found] == pictures
    for image, row in zip(found, wanted, strict=True):
        assert [guess["label"] for guess in image["classes"]] == [guess.label for guess in row]
        assert [guess["score"] for guess in image["classes"]] == [guess.score for guess in row]
    assert main(["classify", str(folder), pictures[0], "--size", "32"]) == 0
    lines = capsys.readouterr().out
    assert pictures[0] in lines
    assert lines.count("%") == 5


def test_embed(folder, pictures, tmp_path, capsys):
    wanted = nybble.load(folder).encode(pictures).embedding
    assert main(["embed", str(folder), *pictures, "--out", str(tmp_path / "all.npy")]) == 0
    assert np.array_equal(np.load(tmp_path / "all.npy"), wanted)
    assert main(["embed", str(folder), *pictures, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert np.array_equal(np.float32(found["vectors"]), wanted)
    assert main(["embed", str(folder), *pictures]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == pictures
    numbers = [float(number) for number in lines[1].split("\t")[1].split()]
    assert np.allclose(numbers, wanted[1], rtol=1e-5)


def test_tokens_explain_and_tune(folder, pictures, tmp_path, capsys):
    out = tmp_path / "policy.json"
    search = ["tune-tokens", str(folder), *pictures, "--out", str(out), "--trials", "6"]
    assert main([*search, "--reduction", "0.3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == found["tokens"]
    assert abs(found["macs"] - 0.7) < 1 / 36
    assert not out.with_name("policy.json.trials").exists()

    # The file is taken wherever a method is.
    model = nybble.load(folder, tokens=str(out))
    wanted = model.encode(pictures)
    assert wanted.tokens.shape[1] < 37
    assert main(["embed", str(folder), *pictures, "--tokens", str(out), "--json"]) == 0
    assert np.array_equal(
        np.float32(json.loads(capsys.readouterr().out)["vectors"]), wanted.embedding
    )
    assert main(["classify", str(folder), pictures[0], "--tokens", str(out), "--json"]) == 0
    classes = json.loads(capsys.readouterr().out)["images"][0]["classes"]
    assert classes[0]["score"] == model.classify(pictures)[0][0].score
    assert np.array_equal(
        model.encode(pictures, tokens="off").tokens, nybble.load(folder).encode(pictures).tokens
    )

    png = tmp_path / "why.png"
    for tokens in (str(out), tmp_path / "tome.json"):
        if tokens != str(out):
            tokens.write_text(json.dumps({"name": "tome", "layers": [0, 1], "r": [4, 9]}))
        arguments = ["explain", str(folder), pictures[0], "--out", str(png), "--tokens"]
        assert main([*arguments, str(tokens), "--json"]) == 0
        layers = json.loads(capsys.readouterr().out)["layers"]
        kept = nybble.load(folder).encode(pictures[0], tokens=str(tokens))
        assert layers[-1]["tokens"] == kept.places.shape[1]
        assert [owner % 2**32 for owner in layers[-1]["owners"]] == kept.owners[0].tolist()
        with Image.open(png) as picture:
            values = np.asarray(picture).astype(int)
        # Panels of 24 pixels, magnified, with a margin of 8 and captions of 22.
        side = 24 * 14
        assert values.shape == (8 + side + 22 + 8, 8 + (1 + len(layers)) * (side + 8), 3)
        panels = [
            values[30 : 30 + side, 8 + i * (side + 8) :][:, :side].reshape(6, 56, 6, 56, 3)
            for i in range(1 + len(layers))
        ]
        first, last = (
            panel.transpose(0, 2, 1, 3, 4).reshape(36, -1, 3) for panel in (panels[0], panels[-1])
        )
        owners = np.array(layers[-1]["owners"])
        for patch in range(36):
            members = np.flatnonzero(owners == owners[patch])
            if owners[patch] < 0:
                red = 0.8 * 255 * np.array([0.86, 0.24, 0.5])
                assert np.abs(last[patch] - red - 0.2 * first[patch]).max() <= 1
            elif len(members) > 1:
                assert np.abs(last[patch] - first[members].mean(axis=(0, 1))).max() <= 1
            else:
                assert np.array_equal(last[patch], first[patch])


def test_mistakes(folder, pictures, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no")
    policy = str(tmp_path / "policy.json")
    (tmp_path / "policy.json").write_text('{"name": "random", "layers": [1], "keep": 0.5}')
    for arguments, word in [
        (["classify", str(folder), str(tmp_path / "broken.jpg")], "broken.jpg"),
        (["classify", str(folder), "nowhere.png"], "nowhere.png"),
        (["classify", str(folder), pictures[0], "--size", "30"], "multiples of the patch"),
        (["embed", str(folder), pictures[0], "--out", str(tmp_path)], str(tmp_path)),
        (["embed", str(folder), pictures[0], "--tokens", "zero"], "zero_tprune"),
        (["embed", str(folder), pictures[0], "--tokens", "no.json"], "no.json"),
        (["embed", str(folder), pictures[0], "--tokens", "evit"], "layers below 3"),
        (["explain", str(folder), pictures[0], "--out", str(tmp_path)], "layers below 3"),
        (
            ["explain", str(folder), pictures[0], "--tokens", policy, "--out", str(tmp_path)],
            str(tmp_path),
        ),
        (
            ["tune-tokens", str(folder), pictures[0], "--out", str(tmp_path / "no" / "x")],
            str(tmp_path / "no"),
        ),
        (["run", str(folder), "-p", "hello"], "image encoder"),
        (["bench", str(folder)], "image encoder"),
    ]:
        assert main(arguments) == 1
        shown = capsys.readouterr().err
        assert word in shown
        assert "defect" not in shown


def test_inspect_and_compress(folder, tmp_path, capsys):
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "reads images" in shown
    assert "vocabulary" not in shown
    out = tmp_path / "small"
    assert main(["compress", str(folder), "--out", str(out), "--weights", "8", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["reads"], found["layers"], found["tokenizer"]) == ("images", 3, None)
    assert found["scheme"].startswith("W8A8")
