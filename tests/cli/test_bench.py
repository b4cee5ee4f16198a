"""``nybble bench``: the fields, the forms, and that what is said was measured."""

import csv
import io
import json
import statistics

import numpy as np
import pytest

from nybble.bench import SpeedTest, combinations, machine, speed
from nybble.bench.report import markdown_text
from nybble.errors import ArgumentError

SMALL = ["-p", "8", "-n", "3", "-r", "2", "-t", "2"]
FIELDS = {
    *("test", "build", "cpu_info", "backends", "isa", "kernel", "model_filename", "model_type"),
    *("model_size", "model_n_params", "weight_scheme", "n_batch", "n_threads", "type_k", "type_v"),
    *("n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts"),
    *("samples_ns", "samples_ts", "ttft_ms", "sparsity", "draft", "accepted_per_step", "peak_rss"),
    *("memory_bandwidth", "bandwidth_share", "weight_bytes_per_token", "token_policy"),
}


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch):
    monkeypatch.setattr(speed, "BANDWIDTH_MEGABYTES", 8)


def test_json_has_every_field(run_json, compressed_folder):
    results = run_json("bench", compressed_folder, *SMALL, "-d", "0,16")["results"]
    assert [r["test"] for r in results] == ["pp8", "tg3", "pp8 @ d16", "tg3 @ d16"]
    for record in results:
        assert set(record) == FIELDS
        tokens = record["n_prompt"] or record["n_gen"]
        assert len(record["samples_ns"]) == 2
        assert record["samples_ts"] == [tokens * 1e9 / ns for ns in record["samples_ns"]]
        assert record["avg_ts"] == pytest.approx(statistics.fmean(record["samples_ts"]))
        assert record["stddev_ts"] == pytest.approx(statistics.stdev(record["samples_ts"]))
        assert record["n_threads"] == 2
        assert record["weight_scheme"] == "W4A8 g32 asym"
        assert record["kernel"].startswith("w4a8/")
        assert record["memory_bandwidth"] > 0
        assert record["peak_rss"] > 1 << 20
    # From the samples: `avg_ns` is rounded to whole nanoseconds, and the tiny model is quick.
    assert results[0]["ttft_ms"] == pytest.approx(statistics.fmean(results[0]["samples_ns"]) / 1e6)
    assert results[1]["ttft_ms"] is None
    assert results[0]["bandwidth_share"] is None
    share = results[1]["weight_bytes_per_token"] * results[1]["avg_ts"]
    assert results[1]["bandwidth_share"] == pytest.approx(share / results[1]["memory_bandwidth"])


def test_the_forms_agree_on_the_fields(run, tiny_folder):
    table = run("bench", tiny_folder, *SMALL, "-o", "csv", "-q")
    rows = list(csv.DictReader(io.StringIO(table.out)))
    assert [row["test"] for row in rows] == ["pp8", "tg3"]
    assert set(rows[0]) == FIELDS
    assert len(json.loads(rows[0]["samples_ns"])) == 2
    lines = run("bench", tiny_folder, *SMALL, "-o", "jsonl", "-q").out.splitlines()
    assert [set(json.loads(line)) for line in lines] == [FIELDS, FIELDS]


def test_tables_for_people(run, tiny_folder):
    for form in ("table", "md"):
        outcome = run("bench", tiny_folder, *SMALL, "-o", form, "-q")
        assert outcome.code == 0, outcome.err
        for word in ("pp8", "tg3", "tok/s", "±", "f32/"):
            assert word in outcome.out
        assert "GB/s with 2 threads" in outcome.out
        assert outcome.err == ""


def test_only_what_is_asked_for(run_json, tiny_folder):
    results = run_json("bench", tiny_folder, "-p", "0", "-n", "2", "-r", "1", "-q")["results"]
    assert [r["test"] for r in results] == ["tg2"]
    assert results[0]["stddev_ts"] == 0


def test_more_than_the_context(run, tiny_folder):
    outcome = run("bench", tiny_folder, "-p", "500", "-d", "100")
    assert outcome.code == 1
    assert "pp500 @ d100: expected at most 512 tokens" in outcome.err


def test_the_bytes_a_token_reads(run_json, tiny_folder, tiny_gguf):
    """An embedding of its own is not read but for one row; a shared one is the head."""
    untied = run_json("bench", tiny_folder, "-p", "0", "-n", "1", "-r", "1", "-q")["results"][0]
    assert untied["model_size"] - untied["weight_bytes_per_token"] == 290 * 64 * 4
    tied = run_json("bench", tiny_gguf, "-p", "0", "-n", "1", "-r", "1", "-q")["results"][0]
    assert tied["model_size"] == tied["weight_bytes_per_token"]


def test_combinations_and_names():
    names = [test.name for test in combinations([512, 0], [0, 128], [0, 64])]
    assert names == ["pp512", "tg128", "pp512 @ d64", "tg128 @ d64"]
    for wrong in ((0, 0, 0), (1, 1, 0), (-1, 0, 0), (1, 0, -1)):
        with pytest.raises(ArgumentError):
            SpeedTest(*wrong)


def test_the_trace_is_always_the_same():
    first, again = speed._trace(1000, 64), speed._trace(1000, 64)
    assert first.dtype == np.uint32
    assert (first == again).all()
    assert first.max() < 1000
    assert (speed._trace(1000, 32) == first[:32]).all()


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        ("W4A8 g32 asym", "w4a8/avx2"),
        ("W8A8 g32 sym", "w8a8/scalar"),
        ("W4A16 g32 asym", "f32/avx2"),
        ("BF16", "f32/avx2"),
        ("unknown", "f32/avx2"),
    ],
)
def test_the_kernel_that_counts(scheme, kernel):
    kernels = ["quantize/avx2", "w4a8/avx2", "w8a8/scalar", "f32/avx2"]
    assert speed.matmul_kernel(kernels, scheme) == kernel


def test_markdown_is_aligned():
    text = markdown_text(["a", "long"], [["1", "2"], ["333", "4"]], {1})
    assert text == "| a   | long |\n| --- | ---: |\n| 1   |    2 |\n| 333 |    4 |\n"


def test_the_machine_is_described():
    assert machine.cpu_name()
    assert machine.cpus() >= 1
    peak = machine.peak_rss()
    assert peak is None or peak > 1 << 20
    if machine.reset_peak_rss():
        block = bytearray(200 << 20)
        block[::4096] = b"x" * len(block[::4096])
        high = machine.peak_rss()
        del block
        assert machine.reset_peak_rss()
        assert high - machine.peak_rss() > 100 << 20
