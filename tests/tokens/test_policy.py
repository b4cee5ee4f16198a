"""Policies: what they may say, and every way to give one."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nybble
from nybble.compress.recipe import read
from nybble.errors import ArgumentError, ConfigError, FormatError, NybbleError
from nybble.tokens import METHODS, AgileQuant, TokenPolicy, settings
from plain import ids

FULL = {
    "ratio": 0.5,
    "criterion": "received",
    "layers": [1],
    "positions": "renumbered",
    "action": "drop",
    "min_prompt": 10,
    "seed": 3,
}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "tokens.ratio: expected a value"),
        ({"ratio": 1}, "below 1, found 1"),
        ({"ratio": -0.1}, "at least 0"),
        ({"ratio": math.nan}, "found nan"),
        ({"ratio": True}, "found True"),
        ({"ratio": "0.5"}, "found '0.5'"),
        ({"ratio": 0.5, "criterion": "best"}, "start, received, random, found 'best'"),
        ({"ratio": 0.5, "positions": "new"}, "kept, renumbered"),
        ({"ratio": 0.5, "action": "merge"}, "drop, 4bit"),
        ({"ratio": 0.5, "layers": []}, "ascending"),
        ({"ratio": 0.5, "layers": [2, 2]}, "ascending"),
        ({"ratio": 0.5, "layers": [-1]}, "ascending"),
        ({"ratio": 0.5, "layers": 3}, "ascending"),
        ({"ratio": 0.5, "min_prompt": -1}, "min_prompt"),
        ({"ratio": 0.5, "seed": 1.5}, "seed"),
        ({"rate": 0.5}, "did you mean ratio"),
        ({"name": "agile_quan"}, "did you mean agile_quant"),
        ({"name": "agile_quant", "beta": 2}, "tokens.ratio"),
        ({"name": "agile_quant", "bits": 5}, "tokens.bits: expected 4"),
        ({"name": "agile_quant", "ratio": 0.5}, "unknown key in tokens"),
        (3, "expected a TokenPolicy or a mapping, found int"),
        ("start", "unknown token reduction method"),
    ],
)
def test_what_cannot_be_meant(values, words, tiny_folder):
    with pytest.raises(ArgumentError, match=words):
        settings(values)
    with pytest.raises(ArgumentError, match=words):
        nybble.load(tiny_folder, tokens=values)


def test_methods_make_policies():
    assert METHODS["agile_quant"] is AgileQuant
    policy = AgileQuant(beta=0.4, layers=(3, 5)).policy()
    assert policy == TokenPolicy(0.4, "start", (3, 5), "renumbered", "drop")
    assert AgileQuant(bits=4).policy().action == "4bit"
    assert settings(AgileQuant()) == settings({"name": "agile_quant"})
    assert settings(None) is None
    assert settings(FULL) == FULL
    assert settings(TokenPolicy(**FULL)) == FULL


@given(
    st.builds(
        TokenPolicy,
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["start", "received", "random"]),
        st.none() | st.just((1,)),
        st.sampled_from(["kept", "renumbered"]),
        st.just("drop"),
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**64 - 1),
    )
)
def test_the_core_reads_every_policy(tiny, policy):
    tiny.session(tokens=policy)
    assert settings(settings(policy)) == settings(policy)


def test_the_core_s_defaults_are_these(tiny_folder):
    """A folder's policy may leave out what has a default."""
    raw = nybble._nybble.Model.open(str(tiny_folder), tokens='{"ratio": 0.25}')
    values = dataclasses.asdict(TokenPolicy(0.25))
    assert json.loads(raw.info())["tokens"] == values


def test_a_folder_says_what_to_do(tiny_folder, tmp_path):
    recipe = {"weights": {"bits": 8}, "tokens": FULL}
    nybble.compress(tiny_folder, tmp_path / "out", recipe=recipe, progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["nybble"]["run"] == {"tokens": FULL}
    model = nybble.load(tmp_path / "out", 2)
    assert model.info["tokens"] == FULL

    def layers(model, **options):
        session = model.session(**options)
        session.forward(ids(100), prompt=True)
        return session.layer_tokens

    assert layers(model) == [100, 100]  # the last layer's own keys and values are complete
    assert layers(model, tokens={"ratio": 0.5, "layers": [0]}) == [100, 50]
    assert layers(model, tokens="off") == [100, 100]
    assert nybble.load(tmp_path / "out", 2, tokens="off").info["tokens"] is None
    # What the folder says is not to be guessed at.
    config["nybble"]["run"]["tokens"]["rate"] = 1
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(NybbleError, match=r"run.tokens.rate is not supported.*newer nybble"):
        nybble.load(tmp_path / "out")
    config["nybble"]["run"]["tokens"] = {"ratio": 1.0}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"run.tokens.ratio: expected a share"):
        nybble.load(tmp_path / "out")


def test_recipes_name_methods_and_refuse_the_rest():
    recipe = read({"tokens": {"name": "agile_quant", "beta": 0.3}})
    assert recipe.tokens == settings(AgileQuant(beta=0.3))
    assert read(None).tokens is None
    for values, words in (({"ratio": 2}, "recipe: tokens.ratio"), (3, "recipe: tokens: expected")):
        with pytest.raises(ConfigError, match=words):
            read({"tokens": values})


def test_recipes_are_written_back(tmp_path):
    recipe = read({"tokens": FULL})
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert read(tmp_path / "again.yaml") == recipe


def test_generation_prunes_its_prompt_and_nothing_else(tiny_folder):
    model = nybble.load(tiny_folder, 2, tokens=TokenPolicy(0.5, layers=(0,)))
    result = model.generate(ids(80), 10, ignore_end=True)
    assert result.metrics["layer_tokens"] == [80, 40]
    assert result.metrics["kv_bytes"] == (80 + 40) * 2 * 2 * 16 * 4
    session = model.session()
    model.generate(ids(80), 10, ignore_end=True, session=session)
    assert session.layer_tokens == [89, 49]
    # A conversation goes on: only its rest is computed, and pruned where it is long enough.
    text = session.tokens
    more = model.generate([*text, 7, 8, 9], 4, ignore_end=True, session=session)
    assert more.metrics["prefill_tokens"] == 3
    assert session.layer_tokens == [95, 55]
    # The same prompt again gives the same text: it is computed anew, as a whole.
    again = model.generate(ids(80), 10, ignore_end=True, session=session)
    assert again.tokens == result.tokens
    assert again.metrics["prefill_tokens"] == 80
    short = model.generate(ids(20), 10, ignore_end=True)
    assert short.metrics["layer_tokens"] == [20, 20]
    assert short.tokens == nybble.load(tiny_folder, 2).generate(ids(20), 10, ignore_end=True).tokens


def test_the_same_prompt_means_the_same_likelihood(tiny_folder):
    """Whatever was scored before: a reduced prompt is computed as a whole."""
    from nybble.eval.likelihood import Scorer

    model = nybble.load(tiny_folder, 2, tokens=TokenPolicy(0.5, layers=(0,)))
    prompt, other = ids(90), ids(50) + ids(60, seed=1)
    fresh = Scorer(model).score(prompt, [5, 6])
    scorer = Scorer(model)
    scorer.score(prompt[:40], [5])
    scorer.score(other, [5])
    assert scorer.score(prompt, [5, 6]).logprob == fresh.logprob
    assert scorer.score(prompt, [5, 6]).logprob == fresh.logprob
    assert fresh.logprob != Scorer(nybble.load(tiny_folder, 2)).score(prompt, [5, 6]).logprob
