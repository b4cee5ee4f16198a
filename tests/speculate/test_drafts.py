"""Speculation from Python: settings, the same tokens, metrics, files."""

import json

import numpy as np
import pytest

import nybble
from nybble.errors import ArgumentError, FormatError, MissingFileError, TokenError, UnsupportedError
from nybble.speculate import Drafts, build, parse, times

PROMPT = "the cat sat on the mat and the cat sat"


@pytest.fixture(scope="module")
def plain(tiny):
    return tiny.generate(PROMPT, 60, draft="off", ignore_end=True)


@pytest.mark.parametrize(
    "draft",
    ["auto", "recycle", "recycle:paper", "recycle:5", "ngram", "suffix+recycle:9", "random:4"],
)
def test_the_tokens_are_the_same(tiny, plain, draft):
    for _ in range(2):  # the second time the matrix is hot
        found = tiny.generate(PROMPT, 60, draft=draft, ignore_end=True)
        assert found.tokens == plain.tokens
        assert found.text == plain.text
    drawn = {"temperature": 0.9, "seed": 4, "ignore_end": True}
    expected = tiny.generate(PROMPT, 40, draft="off", **drawn).tokens
    assert tiny.generate(PROMPT, 40, draft=draft, **drawn).tokens == expected


def test_metrics_say_what_happened(tiny, plain):
    assert plain.metrics["draft"] is None
    assert plain.metrics["decode_steps"] == plain.metrics["decode_tokens"]
    metrics = tiny.generate(PROMPT, 60, draft="suffix+recycle:9", ignore_end=True).metrics
    draft = metrics["draft"]
    assert sum(draft["tokens_by_step"]) == metrics["decode_steps"] < metrics["decode_tokens"]
    given = sum(n * count for n, count in enumerate(draft["tokens_by_step"], 1))
    assert given == metrics["decode_tokens"]
    assert draft["accepted_tokens"] == metrics["decode_tokens"] - metrics["decode_steps"] > 0
    assert draft["drafted_tokens"] >= draft["accepted_tokens"]
    assert draft["mean_accepted"] == pytest.approx(given / metrics["decode_steps"])
    assert 0 < draft["verify_seconds"] <= metrics["decode_seconds"]
    assert draft["draft_seconds"] > 0
    assert draft["learn_seconds"] > 0


def test_a_session_goes_on_after_drafts(tiny):
    session = tiny.session()
    first = tiny.generate("the cat", 20, session=session, draft="recycle:8", ignore_end=True)
    ids = [*tiny.tokenizer.encode("the cat"), *first.tokens]
    again = tiny.generate(ids, 20, session=session, draft="recycle:8", ignore_end=True)
    assert again.tokens == tiny.generate(ids, 20, draft="off", ignore_end=True).tokens
    assert again.metrics["prefill_tokens"] == 1
    stream = tiny.stream("the cat", 40, session=session, draft="recycle:8", ignore_end=True)
    next(stream)  # and is left alone
    assert tiny.generate(ids, 20, session=session, ignore_end=True).tokens == again.tokens


def test_settings_are_read_in_all_their_forms():
    assert parse("auto") == parse(None) == parse(True) == Drafts()
    assert parse("off") is parse("none") is parse(False) is None
    assert parse("recycle, ngram") == Drafts(("recycle", "ngram"))
    assert parse(["ngram"]) == parse("ngram") == parse({"sources": "ngram"})
    assert parse("recycle:paper") == Drafts(("recycle",), template="paper")
    assert parse("suffix+pairs+recycle:8") == Drafts(nodes=8)
    assert parse({"sources": ["recycle"], "template": [3, 1]}).template == (3, 1)
    for wrong in ("warp", "", ["warp"], {"source": "ngram"}, {"start": "warm"}, [], 3.5):
        with pytest.raises(ArgumentError, match="draft"):
            parse(wrong)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"k": 0}, "1 to 64"),
        ({"k": 65}, "1 to 64"),
        ({"k": -1}, "-1"),
        ({"nodes": 0}, "1 to 255"),
        ({"sources": ["recycle"], "template": []}, "at least one node"),
        ({"sources": ["recycle"], "template": [0]}, "at least one node"),
        ({"sources": ["recycle"], "template": [1, 0, 5]}, "node 2"),
        ({"sources": ["recycle"], "template": [9]}, "at most 8 children"),
        ({"sources": ["recycle"], "template": "thesis"}, "thesis"),
        ({"sources": ["retrieval"]}, "index"),
        ({"sources": ["model"]}, "model"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tiny, settings, word):
    with pytest.raises(ArgumentError, match=word):
        tiny.generate(PROMPT, 5, draft=settings)


def test_the_matrix_is_kept_in_a_file(tiny, tmp_path):
    path = tmp_path / "matrix"
    tiny.generate(PROMPT, 30, draft="recycle:6", ignore_end=True)
    tiny.save_drafts(path, "recycle:6")
    hot = {"sources": ["recycle"], "nodes": 6, "matrix": str(path)}
    found = tiny.generate(PROMPT, 30, draft=hot, ignore_end=True)
    cold = {"sources": ["recycle"], "nodes": 6, "start": "cold"}
    expected = tiny.generate(PROMPT, 30, draft=cold, ignore_end=True)
    assert found.tokens == expected.tokens
    assert found.metrics["decode_steps"] <= expected.metrics["decode_steps"]
    with pytest.raises(ArgumentError, match="none"):
        tiny.save_drafts(path, "off")
    with pytest.raises(MissingFileError):
        tiny.generate(PROMPT, 3, draft={"matrix": str(tmp_path / "absent")})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(FormatError, match="damaged"):
        tiny.generate(PROMPT, 3, draft={"matrix": str(path), "start": "cold"})
    path.write_bytes(data[:-9])
    with pytest.raises(FormatError):
        tiny.generate(PROMPT, 3, draft={"matrix": str(path), "nodes": 2})


def test_texts_become_a_datastore(tiny, plain, tmp_path):
    path = tmp_path / "texts.index"
    count = build(tiny, [plain.text, "the dog"], path)
    assert path.stat().st_size == 40 + 8 * count
    drafts = {"sources": ["retrieval", "recycle"], "index": str(path), "nodes": 8}
    assert tiny.generate(PROMPT, 60, draft=drafts, ignore_end=True).tokens == plain.tokens
    with pytest.raises(ArgumentError, match="token"):
        build(tiny, [], path)
    raw = nybble._nybble
    with pytest.raises(TokenError):
        raw.build_datastore(path, np.array([1, 9999], dtype=np.uint32), tiny.vocab_size)
    raw.build_datastore(path, np.array([1, 2], dtype=np.uint32), 7)
    with pytest.raises(FormatError, match="as the model has"):
        tiny.generate(PROMPT, 3, draft={**drafts, "nodes": 3})


def test_a_small_model_drafts(tiny, tiny_folder, plain):
    drafts = {"sources": ["model"], "model": str(tiny_folder), "nodes": 4}
    found = tiny.generate(PROMPT, 60, draft=drafts, ignore_end=True)
    assert found.tokens == plain.tokens
    # It is the same model, so nearly every first choice is right.
    assert found.metrics["draft"]["mean_accepted"] > 2


def test_models_whose_attention_takes_no_drafts(tiny_folder, tmp_path):
    folder = tmp_path / "log2"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["nybble"] = {"version": 1, "run": {"softmax": "log2"}}
    (folder / "config.json").write_text(json.dumps(config))
    model = nybble.load(folder, threads=1)
    assert model.generate(PROMPT, 20).metrics["draft"] is None
    with pytest.raises(UnsupportedError, match="log2"):
        model.generate(PROMPT, 20, draft="recycle")


def test_what_a_pass_costs_is_kept(tiny_folder):
    first = nybble.load(tiny_folder, threads=1)
    metrics = first.generate(PROMPT, 40, ignore_end=True).metrics["draft"]
    assert metrics["measure_seconds"] > 0
    found = first.speculator().times()
    assert found[0][0] == 1
    assert times.read(first.info)[0][0] == 1
    second = nybble.load(tiny_folder, threads=1)
    assert second.generate(PROMPT, 40, ignore_end=True).metrics["draft"]["measure_seconds"] == 0
    # What turns out otherwise while running is kept as well; the pace common to all rows is not.
    speculator = second.speculator()
    speculator.set_times([(rows, 3 * seconds) for rows, seconds in times.read(second.info)])
    before = times.read(second.info)
    second._keep_times(speculator)
    assert times.read(second.info) == before
    speculator.set_times([(1, 1.0), (2, 1.5)])
    second._keep_times(speculator)
    assert times.read(second.info) == [(1, 1.0), (2, 1.5)]
    for damaged in ("", "{}", '{"rows": [[2, 1.0]]}', '{"rows": 3}'):
        times.path(first.info).write_text(damaged)
        third = nybble.load(tiny_folder, threads=1)
        assert third.generate(PROMPT, 40, ignore_end=True).metrics["draft"]["measure_seconds"] > 0
    with pytest.raises(ArgumentError, match="ascending"):
        first.speculator().set_times([(1, -1.0)])
