"""``nybble sweep``."""

import json

import pytest

from nybble.bench import sweep
from nybble.cli.app import main

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(
        "the cat sat on the mat. a small model runs fast on the CPU. hello world 1\n" * 90
    )
    return path


def recipe(tmp_path, name, prune):
    path = tmp_path / f"{name}.yaml"
    path.write_text(json.dumps({"prune": prune, "weights": {"bits": 8}}))
    return str(path)


def test_points_are_measured_noted_and_not_measured_twice(
    tiny_folder, text, tmp_path, monkeypatch, capsys
):
    first = recipe(tmp_path, "chance", "random_units")
    second = recipe(tmp_path, "size", {"name": "magnitude_units", "ratio": 0.9})
    monkeypatch.setattr(
        "nybble.bench.speed.combinations",
        lambda *_: [sweep.speed.SpeedTest(8, 0), sweep.speed.SpeedTest(0, 4)],
    )
    command = ["sweep", str(tiny_folder), first, second, "--text", str(text)]
    command += ["--ratios", "0.2,0.3", "-o", str(tmp_path / "out"), "--max-tokens", "256"]
    command += ["--context", "64", "-t", "1", "--quiet"]
    assert main([*command, "--json"]) == 0
    records = json.loads(capsys.readouterr().out)["points"]
    # Both recipes are the same model without pruning.
    found = [(record["recipe"], record["ratio"]) for record in records]
    assert found == [
        ("chance without pruning", 0.0),
        ("chance", 0.2),
        ("chance", 0.3),
        ("size", 0.2),
        ("size", 0.3),
    ]
    dense, *pruned = records
    for record in pruned:
        assert record["parameters"] < dense["parameters"]
        assert record["bytes"] < dense["bytes"]
        assert record["decode"] > 0
        assert record["perplexity"] > 1
    assert records[2]["parameters"] < records[1]["parameters"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sweep.json"]
    monkeypatch.setattr(sweep, "_measure", lambda *_, **__: pytest.fail("measured again"))
    assert main(command) == 0
    assert "chance without pruning" in capsys.readouterr().out


def test_a_sweep_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    records = [
        {
            "recipe": name,
            "ratio": ratio,
            "bytes": 1e6 * (1 - ratio),
            "decode": 9.0,
            "perplexity": 20.0,
        }
        for name, ratio in (("plain", 0.0), ("a", 0.2), ("a", 0.1), ("b", 0.1))
    ]
    sweep.draw(records, tmp_path / "plot.png", "a title")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_mistakes_are_told(tiny_folder, text, tmp_path, capsys):
    command = ["sweep", str(tiny_folder), "--text", str(text), "-o", str(tmp_path / "out")]
    assert main([*command, "w4a8"]) != 0
    assert "nothing to sweep" in capsys.readouterr().err
    chance = recipe(tmp_path, "chance", "random_units")
    assert main([*command, chance, "--ratios", "0.1,1.5"]) == 2
    assert "--ratios" in capsys.readouterr().err
    assert main([*command, chance, "--plot", str(tmp_path / "x.what")]) != 0
    assert not (tmp_path / "out").exists()
