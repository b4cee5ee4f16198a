"""The core's pruned forward pass against a plain one."""

import numpy as np
import pytest

import nybble
from nybble.errors import ArgumentError
from nybble.tokens import TokenPolicy
from plain import Plain, ids
from tiny import write_llama

LAYERS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(
        tmp_path_factory.mktemp("tokens") / "llama", layers=LAYERS, heads=6, hidden=96
    )


@pytest.mark.parametrize("criterion", ["start", "received"])
@pytest.mark.parametrize("positions", ["kept", "renumbered"])
@pytest.mark.parametrize(
    ("ratio", "layers", "n"), [(0.3, (1, 2, 4), 90), (0.75, (0, 1, 3), 200), (0.95, (2,), 65)]
)
def test_the_same_logits(folder, criterion, positions, ratio, layers, n):
    policy = TokenPolicy(ratio, criterion, layers, positions, min_prompt=2)
    plain, session = Plain(folder, policy), nybble.load(folder, 2, tokens=policy).session()
    tokens = ids(n)
    expected = plain.forward(tokens, prompt=True)[-1:]
    assert np.abs(session.forward(tokens, prompt=True) - expected).max() < 1e-4
    assert session.layer_tokens == [len(keys) for keys, _ in plain.caches]
    # What follows is computed in full, one token or several, and sees what is left of the prompt.
    for more in ([5], ids(40, seed=1)):
        expected = plain.forward(more)
        assert np.abs(session.forward(more, "all") - expected).max() < 1e-4
    assert session.layer_tokens == [len(keys) for keys, _ in plain.caches]
    assert len(session) == n + 41
    # A second prompt is pruned among itself, with its own first token not spared.
    second = ids(n, seed=2)
    expected = plain.forward(second, prompt=True)[-1:]
    assert np.abs(session.forward(second, prompt=True) - expected).max() < 1e-4
    assert session.layer_tokens == [len(keys) for keys, _ in plain.caches]


def test_bits_do_not_depend_on_the_threads(folder):
    for criterion in ("start", "received", "random"):
        policy = TokenPolicy(0.6, criterion, (1, 2, 3), min_prompt=2)
        found = []
        for threads in (1, 2, 3):
            session = nybble.load(folder, threads, tokens=policy).session()
            logits = [session.forward(ids(300), prompt=True), session.forward([7, 8], "all")]
            found.append(np.concatenate(logits).tobytes())
        assert found[0] == found[1] == found[2]


def test_nothing_changes_where_nothing_is_dropped(folder):
    tokens = ids(130)
    plain = nybble.load(folder, 2).session()
    expected = plain.forward(tokens), plain.forward([1, 2, 3], "all")
    for policy in (TokenPolicy(0.0), TokenPolicy(0.5, min_prompt=131), TokenPolicy(0.001)):
        session = nybble.load(folder, 2, tokens=policy).session()
        assert np.array_equal(session.forward(tokens, prompt=True), expected[0])
        assert np.array_equal(session.forward([1, 2, 3], "all"), expected[1])
        assert session.layer_tokens == [133] * LAYERS
    # Nor where the tokens are no prompt.
    session = nybble.load(folder, 2, tokens=TokenPolicy(0.5)).session()
    assert np.array_equal(session.forward(tokens), expected[0])


def test_a_reduced_prompt_goes_as_a_whole(folder):
    model = nybble.load(folder, 2, tokens=TokenPolicy(0.5, "received", (1, 3)))
    session = model.session()
    tokens, after = ids(100), ids(20, seed=3)
    first = session.forward(tokens, prompt=True)
    whole = session.forward(after, "all")
    entries = session.layer_tokens
    # Behind the prompt every length can be gone back to.
    assert session.truncate(110) == 110
    assert session.layer_tokens == [count - 10 for count in entries]
    assert np.array_equal(session.forward(after[10:], "all"), whole[10:])
    assert session.truncate(100) == 100
    assert np.array_equal(session.forward(after, "all"), whole)
    # Inside there is no going back; before it there is.
    assert session.truncate(99) == 0
    assert (len(session), session.layer_tokens, session.kv_bytes) == (0, [0] * LAYERS, 0)
    assert np.array_equal(session.forward(tokens, prompt=True), first)
    assert session.rewind([*tokens, 9]) == [9]
    assert session.rewind([*tokens[:99], 9, 9]) == [*tokens[:99], 9, 9]
    # A text before the prompt stays, and the second of two prompts alone.
    session.forward(after)
    session.forward(tokens, prompt=True)
    session.forward(after)
    session.forward(tokens, prompt=True)
    assert session.truncate(200) == 140
    assert session.layer_tokens[0] == 140
    assert session.layer_tokens[-1] < 140
    assert session.truncate(119) == 20
    assert session.layer_tokens == [20] * LAYERS


def test_long_prompts_are_cut_into_parts_that_compete_alone(tmp_path):
    folder = write_llama(tmp_path / "long", layers=3, context=5000)
    session = nybble.load(folder, 2, tokens=TokenPolicy(0.5, layers=(1,))).session()
    tokens = ids(4200)
    whole = session.forward(tokens, prompt=True)
    assert session.layer_tokens == [4200, 4200, 2100]
    session.truncate(0)
    for start in (0, 1400, 2800):  # the same parts by hand
        last = session.forward(tokens[start : start + 1400], prompt=True)
    assert np.array_equal(whole, last)
    assert session.truncate(4199) == 2800
    assert session.layer_tokens == [2800, 2800, 1400]


def test_a_failed_prompt_leaves_the_session_as_it_was(folder):
    model = nybble.load(folder, 2, context=150, tokens=TokenPolicy(0.5, layers=(1, 3)))
    session = model.session()
    session.forward(ids(100), prompt=True)
    state = session.layer_tokens, session.tokens
    with pytest.raises(ArgumentError, match=r"want: expected last or none.*found all"):
        session.forward(ids(64), "all", prompt=True)
    with pytest.raises(nybble.errors.ContextError):
        session.forward(ids(64), prompt=True)  # by its length in the text, not in the cache
    with pytest.raises(nybble.errors.TokenError):
        session.raw.forward(np.array([1] * 40 + [1000], np.uint32), "last", True)
    assert (session.layer_tokens, session.tokens) == state
    assert session.forward(ids(20), "all", prompt=True).shape == (20, 290)  # too short to be pruned


def test_what_a_model_cannot_do(folder):
    for policy, words in (
        ({"ratio": 0.5, "layers": [LAYERS]}, "tokens.layers: expected layers below 5, found 5"),
        ({"ratio": 0.5, "action": "4bit"}, "without 8-bit inputs"),
    ):
        with pytest.raises(nybble.errors.NybbleError, match=words):
            nybble.load(folder, 2, tokens=policy)
    one = write_llama(folder.parent / "one", layers=1)
    with pytest.raises(nybble.errors.NybbleError, match="1 layer"):
        nybble.load(one, tokens=TokenPolicy(0.5))
    model = nybble.load(one, tokens=TokenPolicy(0.5, layers=(0,)))
    session = model.session()
    session.forward(ids(80), prompt=True)
    assert session.layer_tokens == [80]  # its own keys and values are complete
