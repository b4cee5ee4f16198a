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


def test_mistakes(folder, pictures, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no")
    for arguments, word in [
        (["classify", str(folder), str(tmp_path / "broken.jpg")], "broken.jpg"),
        (["classify", str(folder), "nowhere.png"], "nowhere.png"),
        (["classify", str(folder), pictures[0], "--size", "30"], "multiples of the patch"),
        (["embed", str(folder), pictures[0], "--out", str(tmp_path)], str(tmp_path)),
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
