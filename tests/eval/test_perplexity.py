"""Perplexity against a plain computation in float64, and the command around it."""

import gzip
import json
import math

import numpy as np
import pytest

import nybble
from nybble.cli.app import main
from nybble.errors import ArgumentError, FormatError
from nybble.eval import perplexity

TEXT = "the cat sat on the mat, hello world 123; Žluťoučký kůň ✓ " * 30


def plain(model, text, context):
    """Return the mean loss and everything else, computed the long way round."""
    tokens = model.tokenizer.encode(text, add_special_tokens=False)
    losses, sums, counts, size = [], [], [], 0
    for start in range(0, len(tokens), context):
        window = tokens[start : start + context]
        if len(window) < 2:
            continue
        logits = model.forward(window).astype(np.float64)
        top = logits.max(axis=1, keepdims=True)
        logs = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        own = [-logs[i, token] for i, token in enumerate(window[1:])]
        losses += own
        sums.append(sum(own))
        counts.append(len(own))
        size += len(model.tokenizer.decode(window).encode())
        size -= len(model.tokenizer.decode(window[:1]).encode())
    return np.mean(losses), losses, sums, counts, size, len(tokens)


@pytest.mark.parametrize("context", [2, 3, 64, 129, 200, 512])
def test_against_the_long_way_round(tiny, context):
    result = perplexity(tiny, TEXT, context=context)
    mean, losses, sums, counts, size, tokens = plain(tiny, TEXT, context)
    assert result.loss == pytest.approx(mean, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert result.predicted_tokens == len(losses)
    assert result.windows == len(counts)
    assert tokens - result.tokens in (0, 1)
    assert result.predicted_bytes == size
    assert result.bits_per_token == pytest.approx(mean / math.log(2), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / size, rel=1e-6)
    if len(counts) > 1:
        spread = sum((s - n * mean) ** 2 for s, n in zip(sums, counts, strict=True))
        error = math.sqrt(len(counts) / (len(counts) - 1) * spread) / sum(counts)
        assert result.loss_stderr == pytest.approx(error, rel=1e-4)
        assert result.perplexity_stderr == pytest.approx(math.exp(mean) * error, rel=1e-4)
    else:
        assert result.loss_stderr is None


def test_only_the_first_tokens(tiny):
    whole = tiny.tokenizer.encode(TEXT, add_special_tokens=False)
    result = perplexity(tiny, TEXT, context=64, max_tokens=100)
    cut = perplexity(tiny, tiny.tokenizer.decode(whole[:100]), context=64)
    assert result.tokens == 100
    assert result.loss == cut.loss
    assert perplexity(tiny, TEXT * 200, context=64, max_tokens=100).loss == result.loss
    assert perplexity(tiny, TEXT, context=64, max_tokens=10**9).tokens == len(whole)


def test_progress_is_told(tiny):
    seen = []
    result = perplexity(tiny, TEXT, context=64, on_window=lambda *now: seen.append(now))
    assert len(seen) == result.windows
    done, total, value = seen[-1]
    assert done == result.tokens <= total
    assert value == result.perplexity
    assert [now[0] for now in seen] == sorted(now[0] for now in seen)


def test_what_cannot_be_measured(tiny):
    for context in (0, 1, 513):
        with pytest.raises(ArgumentError, match="context: expected 2 to 512"):
            perplexity(tiny, TEXT, context=context)
    with pytest.raises(ArgumentError, match="at least 2 tokens"):
        perplexity(tiny, "", context=64)
    with pytest.raises(ArgumentError, match="at least 2 tokens"):
        perplexity(tiny, "a", context=64)
    with pytest.raises(ArgumentError, match="max_tokens"):
        perplexity(tiny, TEXT, context=64, max_tokens=1)


def test_logits_that_are_no_numbers_are_an_error(broken):
    with pytest.raises(FormatError, match="window 1: the model's logits are not finite"):
        perplexity(broken, TEXT, context=64)


def test_files_of_every_form_give_the_same(tiny, tiny_folder, tmp_path, capsys):
    rows = TEXT.split(", ")
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(rows))
    lines = tmp_path / "a.jsonl.gz"
    content = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    lines.write_bytes(gzip.compress(content.encode()))
    expected = perplexity(tiny, text, context=64)
    for file in (text, lines):
        arguments = ["eval", str(tiny_folder), "--text", str(file), "--context", "64", "--json"]
        assert main(arguments) == 0
        captured = capsys.readouterr()
        value = json.loads(captured.out)
        assert value["loss"] == expected.loss
        assert value["text"] == str(file)
        assert value["tokens_per_second"] > 0
        assert "eval:" in captured.err  # the progress bar


def test_the_table(tiny_folder, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    arguments = ["eval", str(tiny_folder), "--text", str(tmp_path / "a.txt"), "-c", "64", "-q"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for word in ("perplexity", "±", "bits per byte", "windows of 64", "tok/s"):
        assert word in captured.out


def test_failures_are_one_line(tiny_folder, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("a")
    for text, says in (("none.txt", "none.txt: no such file"), ("short.txt", "at least 2 tokens")):
        arguments = ["eval", str(tiny_folder), "--text", str(tmp_path / text), "-c", "64"]
        assert main(arguments) == 1
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert says in err


def test_a_compressed_folder_is_measured_alike(tiny_folder, tmp_path):
    nybble.compress(tiny_folder, tmp_path / "w8", weights=8, activations=16, progress=False)
    before = perplexity(nybble.load(tiny_folder), TEXT, context=64)
    after = perplexity(nybble.load(tmp_path / "w8"), TEXT, context=64)
    assert after.tokens == before.tokens
    assert after.loss == pytest.approx(before.loss, rel=0.02)
    assert after.loss != before.loss
