"""Divergence and agreement of two models, against a plain computation in float64."""

import json

import numpy as np
import pytest

import nybble
from nybble.errors import ArgumentError, FormatError
from nybble.eval import agreement, perplexity
from tiny import byte_level_tokenizer, write_llama, write_tokenizer

TEXT = "the cat sat on the mat, hello world 123; a small model runs fast on the CPU ✓ " * 20


@pytest.fixture(scope="module")
def w8(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("agreement") / "w8"
    nybble.compress(tiny_folder, out, weights=8, activations=16, progress=False)
    return nybble.load(out)


def logs(logits):
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("prompt", [1, 30])
@pytest.mark.parametrize("context", [64, 300])
def test_against_the_long_way_round(tiny, w8, context, prompt):
    result = agreement(w8, tiny, TEXT, context=context, prompt_tokens=prompt)
    tokens = tiny.tokenizer.encode(TEXT, add_special_tokens=False)
    divergence, same, difference, counts = [], [], [], []
    for start in range(0, len(tokens), context):
        window = tokens[start : start + context]
        if len(window) <= prompt:
            continue
        rows = slice(prompt - 1, -1)
        p, q = logs(tiny.forward(window)[rows]), logs(w8.forward(window)[rows])
        divergence += [np.exp(a) @ (a - b) for a, b in zip(p, q, strict=True)]
        same += (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
        targets = window[prompt:]
        index = np.arange(len(targets))
        difference += (p[index, targets] - q[index, targets]).tolist()
        counts.append(len(targets))
    assert result.kl == pytest.approx(np.mean(divergence), abs=1e-6, rel=1e-3)
    assert result.kl_max == pytest.approx(np.max(divergence), abs=1e-6, rel=1e-3)
    assert result.top1 == np.mean(same)
    assert result.loss_difference == pytest.approx(np.mean(difference), abs=1e-6)
    sums = [part.sum() for part in np.split(np.array(divergence), np.cumsum(counts)[:-1])]
    spread = sum((s - n * np.mean(divergence)) ** 2 for s, n in zip(sums, counts, strict=True))
    error = np.sqrt(len(counts) / (len(counts) - 1) * spread) / sum(counts)
    assert result.kl_stderr == pytest.approx(error, abs=1e-6, rel=1e-2)
    assert 0 < result.kl < 0.1
    assert 0.8 < result.top1 <= 1


def test_the_perplexities_are_those_measured_alone(tiny, w8):
    result = agreement(w8, tiny, TEXT, context=100)
    assert result.model.loss == pytest.approx(perplexity(w8, TEXT, context=100).loss, abs=1e-12)
    alone = perplexity(tiny, TEXT, context=100)
    assert result.reference.loss == pytest.approx(alone.loss, abs=1e-12)
    assert result.reference.predicted_bytes == alone.predicted_bytes
    difference = result.model.loss - result.reference.loss
    assert result.loss_difference == pytest.approx(difference, abs=1e-9)
    assert result.loss_difference_stderr < alone.loss_stderr  # the point of reading the same text


def test_a_model_agrees_with_itself(tiny):
    result = agreement(tiny, tiny, TEXT, context=128)
    assert (result.kl, result.kl_max, result.top1, result.loss_difference) == (0, 0, 1, 0)
    assert result.kl_stderr == 0
    assert agreement(tiny, tiny, TEXT, context=128, max_tokens=100).kl_stderr is None


def test_progress_is_told(tiny, w8):
    seen = []
    result = agreement(w8, tiny, TEXT, context=64, on_window=lambda *now: seen.append(now))
    assert len(seen) == result.model.windows
    assert seen[-1][0] == result.model.tokens
    assert seen[-1][2] == result.kl


def test_other_tokenizers_are_refused(tiny, tmp_path):
    other = write_llama(tmp_path / "vocabulary", vocab=300)
    write_tokenizer(other)
    with pytest.raises(ArgumentError, match="290 tokens, found 300"):
        agreement(tiny, nybble.load(other), TEXT)
    merges = write_llama(tmp_path / "merges")
    tokenizer = json.loads(byte_level_tokenizer().to_str())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:3]
    write_tokenizer(merges)
    (merges / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ArgumentError, match="differently from token") as caught:
        agreement(tiny, nybble.load(merges), TEXT)
    assert str(merges) in str(caught.value)


def test_the_shorter_context_is_the_limit(tiny, tmp_path):
    short = write_llama(tmp_path / "short", context=100)
    write_tokenizer(short)
    with pytest.raises(ArgumentError, match="context: expected 2 to 100"):
        agreement(tiny, nybble.load(short), TEXT, context=128)


def test_logits_that_are_no_numbers_are_an_error(tiny, broken):
    with pytest.raises(FormatError, match="broken: window 1: the model's logits are not finite"):
        agreement(broken, tiny, TEXT, context=64)
