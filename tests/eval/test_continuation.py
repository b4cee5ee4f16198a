"""The loss behind a prompt, against a plain computation and against the perplexity."""

import math

import numpy as np
import pytest

import nybble
from nybble.errors import ArgumentError
from nybble.eval import continuation, perplexity
from nybble.eval.windows import predictions

TEXT = "the cat sat on the mat, hello world 123; a small model runs fast on the CPU ✓ " * 30


def plain(model, text, context, prompt):
    """Return the losses of each window's tokens behind its prompt, the long way round."""
    tokens = model.tokenizer.encode(text, add_special_tokens=False)
    windows = []
    for start in range(0, len(tokens), context):
        window = tokens[start : start + context]
        logits = model.forward(window).astype(np.float64)
        top = logits.max(axis=1, keepdims=True)
        logs = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        windows.append([-logs[i - 1, window[i]] for i in range(prompt, len(window))])
    return [losses for losses in windows if losses]


@pytest.mark.parametrize(("prompt", "context"), [(1, 64), (2, 3), (40, 64), (63, 64), (100, 400)])
def test_against_the_long_way_round(tiny, prompt, context):
    result = continuation(tiny, TEXT, prompt_tokens=prompt, context=context)
    windows = plain(tiny, TEXT, context, prompt)
    losses = [loss for window in windows for loss in window]
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert (result.predicted_tokens, result.windows) == (len(losses), len(windows))
    assert (result.prompt_tokens, result.context) == (prompt, context)
    assert result.tokens == len(losses) + prompt * len(windows)


def test_a_prompt_of_one_token_gives_the_perplexity(tiny):
    one = continuation(tiny, TEXT, prompt_tokens=1, context=100)
    whole = perplexity(tiny, TEXT, context=100)
    assert (one.loss, one.predicted_bytes) == (whole.loss, whole.predicted_bytes)


def test_the_bytes_are_those_behind_the_prompt(tiny):
    result = continuation(tiny, TEXT, prompt_tokens=30, context=10**3 // 2, max_tokens=200)
    tokens = tiny.tokenizer.encode(TEXT, add_special_tokens=False)[:200]
    assert result.predicted_bytes == len(tiny.tokenizer.decode(tokens[30:]).encode())


def test_a_window_no_longer_than_the_prompt_is_left_out(tiny):
    cut = continuation(tiny, TEXT, prompt_tokens=20, context=50, max_tokens=120)
    assert cut.windows == 2
    assert continuation(tiny, TEXT, prompt_tokens=20, context=50, max_tokens=121).windows == 3


def test_the_prompt_is_one_pass(tiny):
    """What a session does to prompts acts on the whole prompt, and on nothing behind it."""
    passes = []

    class Watched:
        def __init__(self):
            self.session = tiny.session()

        def truncate(self, n):
            self.session.truncate(n)

        def forward(self, ids, want, *, prompt=False):
            passes.append((len(ids), want, prompt))
            return self.session.forward(ids, want, prompt=prompt)

    continuation(tiny, TEXT, prompt_tokens=300, context=500, max_tokens=500, session=Watched())
    assert passes == [(300, "last", True), (128, "all", False), (71, "all", False)]


def test_every_token_is_predicted_once(tiny):
    window = tiny.tokenizer.encode(TEXT)[:300]
    for prompt in (1, 2, 150, 299):
        targets = [t for _, part in predictions(tiny.session(), window, prompt) for t in part]
        assert targets == window[prompt:]


def test_what_cannot_be_measured(tiny):
    for prompt, context in ((0, 64), (64, 64), (-1, 64)):
        with pytest.raises(ArgumentError, match="prompt_tokens: expected 1 to 63"):
            continuation(tiny, TEXT, prompt_tokens=prompt, context=context)
    with pytest.raises(ArgumentError, match="context: expected 2 to 512"):
        continuation(tiny, TEXT, prompt_tokens=5, context=600)
    with pytest.raises(ArgumentError, match="text: expected at least 101 tokens"):
        continuation(tiny, TEXT, prompt_tokens=100, context=200, max_tokens=100)


def test_the_command(tiny_folder, tmp_path, capsys):
    import json

    from nybble.cli.app import main

    (tmp_path / "a.txt").write_text(TEXT)
    arguments = ["eval", str(tiny_folder), "--text", str(tmp_path / "a.txt"), "-c", "100"]
    arguments += ["--prompt-tokens", "80", "-q"]
    assert main([*arguments, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    expected = continuation(nybble.load(tiny_folder), TEXT, prompt_tokens=80, context=100)
    assert value["loss"] == expected.loss
    assert value["prompt_tokens"] == 80
    assert main(arguments) == 0
    assert "behind prompts of 80" in capsys.readouterr().out
