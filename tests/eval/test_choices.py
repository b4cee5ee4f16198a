"""Scores of choices against a plain computation, and the figures made of them."""

import json

import numpy as np
import pytest

import nybble
from nybble.errors import ArgumentError, ContextError, FormatError
from nybble.eval import accuracy
from nybble.eval.choices import Scored, score
from nybble.eval.likelihood import Scorer, encode_pair
from nybble.eval.tasks import Item, find
from tiny import write_llama, write_tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "small", "model", "runs", "hello", "CPU", "123"]


def questions(count, seed=0):
    """Made-up rows of three choices of different lengths."""
    random = np.random.default_rng(seed)

    def words(most):
        return " ".join(random.choice(WORDS, random.integers(1, most + 1)))

    return [
        {
            "question": words(12),
            "choices": [words(6) for _ in range(3)],
            "answer": int(random.integers(3)),
        }
        for _ in range(count)
    ]


def items(count, seed=0):
    return [find("arc_easy").read(row) for row in questions(count, seed)]


def plain(model, prompt, continuation):
    """Return the log-likelihood of tokens behind others, in float64 and from nothing."""
    logits = model.forward([*prompt, *continuation][:-1]).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = logs[len(prompt) - 1 :]
    picked = rows[np.arange(len(continuation)), continuation]
    return picked.sum(), bool((rows.argmax(axis=1) == continuation).all())


def test_likelihoods_against_the_long_way_round(tiny):
    scorer = Scorer(tiny)
    random = np.random.default_rng(3)
    prompts = [random.integers(0, 290, n).tolist() for n in (1, 5, 40)]
    prompts += [[*prompts[2][:20], 7], prompts[2][:20], prompts[2]]  # shares, goes back, returns
    for prompt in prompts:
        for length in (1, 2, 130, 1):
            continuation = random.integers(0, 290, length).tolist()
            found = scorer.score(prompt, continuation)
            assert found.logprob == pytest.approx(plain(tiny, prompt, continuation)[0], rel=1e-6)
            assert (found.tokens, found.dropped, found.greedy) == (length, 0, False)


def test_a_greedy_continuation_is_known_as_such(tiny):
    prompt = tiny.tokenizer.encode("the cat")
    best = tiny.generate(prompt, 5, ignore_end=True).tokens
    scorer = Scorer(tiny)
    assert scorer.score(prompt, list(best)).greedy
    other = [*best[:-1], (best[-1] + 1) % 290]
    assert not scorer.score(prompt, other).greedy
    assert not scorer.score(prompt, [(best[0] + 1) % 290, *best[1:]]).greedy


def test_what_is_shared_is_computed_once(tiny):
    scorer = Scorer(tiny)
    first, second = [9, 8, 7, 6], [9, 8, 5]
    assert scorer.score(first, [1, 2, 3]).computed == 6  # the prompt and all but the last
    assert scorer.score(first, [4]).computed == 0
    assert scorer.score(first, [1, 2]).computed == 1
    assert scorer.score(second, [1]).computed == 1
    for prompt, continuation in ((first, [1, 2, 3]), (second, [3, 4]), (first, [4, 5])):
        assert (
            scorer.score(prompt, continuation).logprob
            == Scorer(tiny).score(prompt, continuation).logprob
        )


def test_texts_longer_than_the_context_lose_their_beginning(tmp_path):
    folder = write_llama(tmp_path / "short", context=16)
    write_tokenizer(folder)
    model = nybble.load(folder)
    prompt = list(range(20))
    found = Scorer(model).score(prompt, [1, 2, 3])
    assert found.dropped == 6  # 17 tokens are left: the last one is not computed
    assert found.logprob == Scorer(model).score(prompt[6:], [1, 2, 3]).logprob
    assert found.logprob == pytest.approx(plain(model, prompt[6:], [1, 2, 3])[0], rel=1e-6)
    assert Scorer(model).score([5], [1] * 16).dropped == 0
    assert Scorer(model).score([5, 6], [1] * 16).dropped == 1
    with pytest.raises(ContextError, match="at most the 16 tokens of the context, found 17"):
        Scorer(model).score([5], [1] * 17)
    (scored,) = score(model, [items(1)[0]])
    assert scored.dropped > 0
    rows = tmp_path / "a.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in questions(4)))
    assert accuracy(model, "arc_easy", rows).truncated == 4


def test_nothing_to_score(tiny):
    for prompt, continuation in (([], [1]), ([1], [])):
        with pytest.raises(ArgumentError, match="expected at least one token, found none"):
            Scorer(tiny).score(prompt, continuation)


def test_pairs_split_at_the_prompts_length(tiny):
    encode = tiny.tokenizer.encode
    assert encode_pair(tiny.tokenizer, "the cat", " sat on") == (
        encode("the cat"),
        encode(" sat on"),
    )
    # Spaces at the end of the prompt belong to what follows.
    assert encode_pair(tiny.tokenizer, "the cat  ", "sat") == (encode("the cat"), encode("  sat"))
    # An empty prompt is the begin token.
    assert encode_pair(tiny.tokenizer, "", "the cat") == ([0], encode("the cat"))
    with pytest.raises(ArgumentError, match="continuation: expected at least one token"):
        encode_pair(tiny.tokenizer, "the cat", "")


def test_scores_of_questions(tiny):
    asked = items(5)
    for item, scored in zip(asked, score(tiny, asked), strict=True):
        assert scored.item == item
        for prompt, ending, logprob in zip(
            item.prompts, item.endings, scored.logprobs, strict=True
        ):
            before, behind = encode_pair(tiny.tokenizer, prompt, ending)
            assert logprob == pytest.approx(plain(tiny, before, behind)[0], rel=1e-6)


def test_hits_by_hand():
    item = Item(("p",) * 3, (" a", " bb", " cccc"), ("a", "bb", "cccc"), 2)
    scored = Scored(item, (-3.0, -2.0, -3.5), (False,) * 3, 0, 0)
    assert (scored.choice, scored.hit) == (1, False)
    assert (scored.choice_norm, scored.hit_norm) == (2, True)  # -3, -1, -0.875
    tie = Scored(item, (-2.0, -2.0, -8.0), (False,) * 3, 0, 0)
    assert tie.choice == 0  # the first of the best
    # Characters are counted, not bytes: -1 each, though the first has 2 bytes.
    wide = Item(("p",) * 2, (" é", " b"), ("é", "b"), 0)
    assert Scored(wide, (-1.0, -1.5), (False,) * 2, 0, 0).choice_norm == 0


def test_accuracy_adds_up(tiny, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions(30)))
    seen = []
    result = accuracy(tiny, "openbookqa", path, on_item=lambda *now: seen.append(now))
    scored = list(score(tiny, [find("openbookqa").read(row) for row in questions(30)]))
    acc = sum(s.hit for s in scored) / 30
    norm = sum(s.hit_norm for s in scored) / 30
    assert (result.acc, result.acc_norm, result.items) == (acc, norm, 30)
    assert acc != norm  # else the test could not tell them apart
    assert result.acc_stderr == pytest.approx(np.std([s.hit for s in scored], ddof=1) / 30**0.5)
    assert result.chance == pytest.approx(1 / 3)
    assert (result.value, result.stderr) == (norm, result.acc_norm_stderr)
    assert result.tokens == sum(s.computed for s in scored)
    assert [now[:2] for now in seen] == [(i + 1, 30) for i in range(30)]
    assert seen[-1][2] == result.value
    one = accuracy(tiny, find("piqa"), path, limit=1)
    assert (one.items, one.acc_stderr) == (1, None)
    assert one.value == one.acc


def test_the_lengths_of_winograndes_options_mean_nothing(tiny, tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"sentence": "the _ sat on the mat", "option1": "cat", "option2": "CPU", "answer": "1"}
    path.write_text(json.dumps(row))
    result = accuracy(tiny, "winogrande", path)
    assert (result.acc_norm, result.acc_norm_stderr) == (None, None)
    sides = [
        plain(tiny, *encode_pair(tiny.tokenizer, f"the {option}", " sat on the mat"))[0]
        for option in ("cat", "CPU")
    ]
    assert result.acc == float(sides[0] > sides[1])


def test_logits_that_are_no_numbers_are_an_error(broken):
    with pytest.raises(FormatError, match="broken: the model's logits are not finite"):
        next(score(broken, items(1)))
