"""``nybble run``: what it writes where."""

import io
import json
import sys

import pytest


@pytest.fixture(params=["tiny_folder", "compressed_folder", "tiny_gguf"])
def model(request):
    """A float folder, a compressed one and a GGUF file."""
    return request.getfixturevalue(request.param)


def test_text_goes_to_stdout_and_figures_to_stderr(run, model):
    import nybble

    outcome = run("run", model, "-p", "the cat", "-n", 12, "-t", 2)
    assert outcome.code == 0, outcome.err
    expected = nybble.load(model, 2).generate("the cat", 12).text
    assert outcome.out.removesuffix("\n") == expected.removesuffix("\n")
    assert outcome.out.endswith("\n")
    line = outcome.err.splitlines()[-1]
    assert "prompt" in line
    assert "12 new at" in line or "ended by stop" in line
    assert "peak memory" in line


def test_quiet_leaves_only_the_text(run, tiny_folder):
    assert run("run", tiny_folder, "-p", "x", "-n", 3, "-q").err == ""


def test_json_is_one_object_with_the_figures(run_json, model):
    value = run_json("run", model, "-p", "the cat", "-n", 5)
    assert value["model"] == str(model)
    assert isinstance(value["text"], str)
    assert len(value["tokens"]) == value["generated_tokens"] <= 5
    assert value["finish_reason"] in ("length", "stop")
    assert value["prompt_tokens"] > 0
    metrics = value["metrics"]
    assert metrics["prefill_tokens"] == value["prompt_tokens"]
    for key in ("prefill_tokens_per_second", "ttft_ms", "peak_rss", "decode_seconds"):
        assert metrics[key] > 0


def test_the_prompt_can_come_from_stdin(run_json, tiny_folder, monkeypatch):
    given = run_json("run", tiny_folder, "-p", "hello world", "-n", 4)
    for text in (b"hello world\n", b"hello world\r\n", b"hello world"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        piped = run_json("run", tiny_folder, "-p", "-", "-n", 4)
        assert piped["tokens"] == given["tokens"]
        assert piped["prompt_tokens"] == given["prompt_tokens"]


def test_stdin_that_is_no_text(run, tiny_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff")))
    outcome = run("run", tiny_folder, "-p", "-")
    assert outcome.code == 1
    assert "expected UTF-8 on stdin, found byte 0xff" in outcome.err


def test_a_seed_repeats_the_text(run_json, tiny_folder):
    options = ["-n", 16, "--temperature", 1.5, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.001]
    first = run_json("run", tiny_folder, "-p", "a", *options)
    again = run_json("run", tiny_folder, "-p", "a", *options, "--seed", first["seed"])
    assert first["tokens"] == again["tokens"]
    texts = {run_json("run", tiny_folder, "-p", "a", *options)["text"] for _ in range(4)}
    assert len(texts) > 1  # without a seed they differ


def test_a_drawn_seed_is_told(run, tiny_folder):
    assert "seed " in run("run", tiny_folder, "-p", "a", "-n", 2, "--temperature", 1).err
    assert "seed " not in run("run", tiny_folder, "-p", "a", "-n", 2).err


def test_chat_puts_the_prompt_into_the_template(run_json, tiny_folder):
    raw = run_json("run", tiny_folder, "-p", "hello", "-n", 1)
    chat = run_json("run", tiny_folder, "-p", "hello", "-n", 1, "--chat")
    system = run_json("run", tiny_folder, "-p", "hello", "-n", 1, "--chat", "--system", "be kind")
    assert raw["prompt_tokens"] < chat["prompt_tokens"] < system["prompt_tokens"]


def test_stop_texts_end_it(run_json, tiny_folder):
    text = run_json("run", tiny_folder, "-p", "the", "-n", 30)["text"]
    piece = text[5:7]
    value = run_json("run", tiny_folder, "-p", "the", "-n", 30, "--stop", piece)
    assert value["text"] == text[: text.index(piece)]
    assert value["finish_reason"] == "stop"


def test_a_prompt_longer_than_the_context(run, tiny_folder):
    outcome = run("run", tiny_folder, "-p", "cat " * 600, "-n", 1)
    assert outcome.code == 1
    assert "context of 512" in outcome.err
    outcome = run("run", tiny_folder, "-p", "the cat sat", "-n", 8, "--context", 2)
    assert outcome.code == 1
    assert "context of 2" in outcome.err
    outcome = run("run", tiny_folder, "-p", "the cat", "--context", 1 << 20)
    assert outcome.code == 1
    assert "context: expected 1 to 512" in outcome.err


def test_a_text_that_fills_the_context(run_json, run, tiny_folder):
    value = run_json("run", tiny_folder, "-p", "the cat", "-n", 200, "--context", 6)
    assert value["finish_reason"] == "context"
    assert value["prompt_tokens"] + value["generated_tokens"] in (6, 7)
    assert "context" in run("run", tiny_folder, "-p", "the cat", "-n", 200, "--context", 6).err


def test_an_empty_prompt(run, tiny_folder):
    outcome = run("run", tiny_folder, "-p", "")
    assert outcome.code == 1
    assert "expected at least one token" in outcome.err


def test_no_new_tokens(run, tiny_folder):
    outcome = run("run", tiny_folder, "-p", "a", "-n", 0)
    assert (outcome.code, outcome.out) == (0, "")


def test_control_characters_do_not_reach_a_terminal(monkeypatch):
    from nybble.cli.output import TextWriter

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, expected in (
        (Terminal(), "a]0;title\tb\n"),
        (io.StringIO(), "a\x1b]0;title\x07\tb\n"),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        writer = TextWriter()
        for piece in ("a\x1b]0;ti", "tle\x07", "\tb"):
            writer.write(piece)
        writer.end()
        assert stream.getvalue() == expected


def test_text_comes_piece_by_piece(start, tiny_folder):
    """The first piece is there long before the last one."""
    process = start("run", tiny_folder, "-p", "hello", "-n", 400, "-q", "--temperature", "2")
    first = process.stdout.read(1)
    assert first
    assert process.poll() is None  # still writing (400 tokens take a while)
    process.communicate(timeout=80)


def test_json_has_no_nan(capsys):
    from nybble.cli.output import emit_json

    emit_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": ("x", None)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": ["x", None]}
