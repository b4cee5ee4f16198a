"""The comparison with other engines still runs; how fast is no concern of a test."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("pp16", "tg4")


def run(*arguments):
    """Run the tool as its users do, with matplotlib's cache out of their way."""
    return subprocess.run(
        [sys.executable, "-m", "benches.peers", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


@pytest.fixture(scope="module")
def peers():
    """The package, which is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        import benches.peers.record
        import benches.peers.rounds

        yield benches.peers


@pytest.fixture(scope="module")
def plots():
    """Skip where runs could not end with a plot."""
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed (extras test and bench)")


@pytest.fixture(scope="module")
def quick(peers, plots, tiny_folder, tmp_path_factory):
    """A quick run through nybble: its folders and what it printed."""
    folder = tmp_path_factory.mktemp("peers")
    out = folder / "out"
    done = run(
        *("--quick", "--engines", "nybble", "--model", str(tiny_folder), "-t", "1", "-r", "2"),
        *("--work", str(folder / "work"), "--out", str(out), "--note", "a test, with a comma"),
    )
    assert done.returncode == 0, done.stderr
    return folder, out, done


@pytest.mark.timeout(300)
def test_csv_and_plot(peers, quick):
    """Every format and test has a row that parses, and the plot is a picture."""
    _, out, done = quick
    (file,), (picture,) = out.glob("*.csv"), out.glob("*.png")
    rows = peers.record.read(file)
    formats = {"W4A8", "W4A8, 4-bit head", "W8A8", "float"}
    assert {(row["format"], row["test"]) for row in rows} == {
        (form, test) for form in formats for test in TESTS
    }
    for row in rows:
        assert row["engine"] == "nybble"
        assert row["n_threads"] == 1
        assert len(row["samples_ts"]) == len(row["memory_bandwidth_samples_gbs"]) == 2
        assert min(row["samples_ts"]) <= row["median_ts"] <= max(row["samples_ts"])
        assert row["memory_bandwidth_gbs"] > 0
        assert row["others_cpus"] >= 0
        assert row["peak_rss"] > row["weight_bytes"] > 0
        assert row["note"] == "a test, with a comma"
        assert row["version"]
        assert row["cpu_info"]
        assert row["isa"]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "pp16, 1t" in done.stdout


@pytest.mark.timeout(300)
def test_prepared_models_are_kept_and_rows_replaced(peers, quick, tiny_folder):
    """A second run converts nothing, and its rows take the place of the first one's."""
    folder, out, first = quick
    assert "prepared nybble W4A8 " in first.stderr
    done = run(
        *("--quick", "--engines", "nybble", "--model", str(tiny_folder), "-t", "1"),
        *("--formats", "W8A8", "--work", str(folder / "work"), "--out", str(out)),
    )
    assert done.returncode == 0, done.stderr
    assert "prepared" not in done.stderr
    (file,) = out.glob("*.csv")
    rows = peers.record.read(file)
    assert len(rows) == 8
    assert {len(row["samples_ts"]) for row in rows if row["format"] == "W8A8"} == {1}
    assert {len(row["samples_ts"]) for row in rows if row["format"] == "W4A8"} == {2}


@pytest.mark.timeout(300)
@pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")),
    reason="torch and transformers are not installed",
)
def test_a_peer(peers, plots, tiny_folder, tmp_path):
    """Another engine runs in its own process."""
    done = run(
        *("--quick", "--engines", "torch", "--formats", "f32", "--model", str(tiny_folder)),
        *("-t", "1", "--work", str(tmp_path / "work"), "--out", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.csv")
    assert {(row["engine"], row["test"]) for row in peers.record.read(file)} == {
        ("torch", test) for test in TESTS
    }


def test_what_is_missing_says_so(peers, tmp_path):
    """An interpreter without the engine: left out with a reason, and nothing to measure."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    answer = peers.rounds.describe("ctranslate2", tmp_path, str(bare))
    assert answer == {"reason": "the package ctranslate2 is not installed"}


def test_a_dead_worker_keeps_its_last_words(peers, tmp_path):
    """A crash is an error with the end of the log, not a hang."""
    worker = peers.rounds.Worker(["serve", "no such engine"], tmp_path / "log", sys.executable, 1)
    try:
        with pytest.raises(peers.rounds.WorkerError, match=r"ended with status 1: .*Error"):
            worker.answer(30)
    finally:
        worker.close()


def test_wrong_options():
    """They are refused before anything is made."""
    done = run("--engines", "nibble")
    assert done.returncode == 2
    assert "nibble: expected some of nybble" in done.stderr


@pytest.fixture(scope="module")
def shapes(peers):
    import benches.peers.shapes

    return benches.peers.shapes


def test_random_shape(shapes, tmp_path):
    """A made model is the same every time and loads."""
    import nybble

    folder = shapes.make("tiny", tmp_path)
    model = nybble.load(folder, threads=1)
    assert model.vocab_size == shapes.SHAPES["tiny"].vocab
    again = shapes.make("tiny", tmp_path / "again")
    assert (folder / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("family", "tied", "head_dim"), [("llama", False, 0), ("llama", True, 32), ("qwen2", True, 0)]
)
def test_gguf_has_the_same_weights(shapes, tmp_path, monkeypatch, family, tied, head_dim):
    """What llama.cpp gets holds what the folder holds, read back by our own GGUF reader."""
    pytest.importorskip("gguf", reason="the gguf package writes the file")
    import numpy as np
    from benches.peers.gguf_writer import write

    from nybble import _nybble

    shape = shapes.Shape(family, 64, 64, 96, 2, 4, 2, tied=tied, head_dim=head_dim)
    monkeypatch.setitem(shapes.SHAPES, "smaller", shape)
    folder = shapes.make("smaller", tmp_path)
    write(folder, tmp_path / "model.gguf", lambda *_: "BF16", None)
    want = _nybble.Checkpoint.open(str(folder))
    found = _nybble.Checkpoint.open(str(tmp_path / "model.gguf"))
    assert set(found.tensors()) == set(want.tensors())
    for name in want.tensors():
        assert np.array_equal(found.read(name), want.read(name)), name


def test_results_folder_names_the_machine(peers):
    name = peers.record.cpu_folder("avx2")
    assert name.endswith("avx2")
    assert name == peers.rounds.slug(name)
