"""Methods: thresholds worked by hand, and what cannot be meant."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.compress.recipe import read
from nybble.errors import ArgumentError, ConfigError
from nybble.sparsity import METHODS, Cats, Chess, Seen, Teal
from nybble.sparsity.allocate import spread


def seen(act, up=None, **inputs):
    act = np.array(act, dtype=np.float32)
    up = np.ones_like(act) if up is None else np.array(up, dtype=np.float32)
    return Seen(act, up, np.abs(up).mean(axis=0, dtype=np.float64), inputs)


def test_cats_takes_a_percentile_of_all_neurons():
    values = seen([[0.1, -0.9], [0.2, 3.0]])
    found = Cats(0.5).fit(values)
    assert found.neurons.tolist() == pytest.approx([0.2, 0.2])
    assert found.active == 0.5
    assert not found.inputs
    assert Cats(0.0).fit(values).neurons.tolist() == [0, 0]
    assert Cats(0.75).fit(values).neurons.tolist() == pytest.approx([0.9, 0.9])


def test_chess_weighs_neurons_by_what_they_are_multiplied_with():
    # Importances |g| E|u|: 0.1 * 4, 0.9 * 0.1; 0.2 * 4, 3 * 0.1: sorted 0.09, 0.3, 0.4, 0.8.
    values = seen([[0.1, -0.9], [0.2, 3.0]], [[4, 0.1], [-4, -0.1]])
    found = Chess(0.5).fit(values)
    assert found.neurons.tolist() == pytest.approx([0.3 / 4, 0.3 / 0.1])
    assert found.active == 0.5
    # Where all are multiplied alike, it is CATS.
    same = seen([[0.1, -0.9], [0.2, 3.0]], [[2, 2], [-2, -2]])
    assert np.allclose(Chess(0.5).fit(same).neurons, Cats(0.5).fit(same).neurons)
    # A neuron that is always multiplied by 0 is off; with nothing to skip none is.
    never = seen([[1.0, 2.0], [3.0, 4.0]], [[0, 1], [0, 1]])
    assert Chess(0.75).fit(never).neurons.tolist() == [math.inf, 2]
    assert Chess(0.0).fit(never).neurons.tolist() == [0, 0]


def test_chess_spares_keys_and_values():
    x = np.array([[1, -2, 3, -4]], dtype=np.float32)
    found = Chess(0.5, attention=0.5).fit(seen([[1.0]], qkv=x, out=2 * x, gate_up=x))
    assert found.inputs == {"q": 2, "out": 4}


def test_teal_takes_every_input():
    x = np.array([[1, -2, 3, -4]], dtype=np.float32)
    found = Teal(0.5).fit(seen([[1, 2]], [[3, -4]], qkv=x, out=2 * x, gate_up=3 * x))
    assert found.inputs == {"qkv": 2, "out": 4, "gate_up": 6, "down": 3}
    assert found.neurons is None


@given(
    st.sampled_from(["cats", "chess"]),
    st.integers(0, 2**32 - 1),
    st.floats(0, 0.95),
    st.floats(0, 0.95),
)
def test_more_sparsity_is_never_fewer_zeros(name, seed, one, two):
    rng = np.random.default_rng(seed)
    values = seen(rng.standard_normal((40, 12)), rng.standard_normal((40, 12)))
    low, high = (
        METHODS.make({"name": name, "sparsity": k}, "sparsity").fit(values)
        for k in sorted((one, two))
    )
    assert (low.neurons <= high.neurons).all()
    assert high.active <= low.active
    # The share that was asked for, to one value.
    assert 1 - high.active == pytest.approx(max(one, two), abs=1.5 / 480)


def test_a_layer_that_is_free_takes_all_it_may():
    shares, even = np.array([0.3, 0.5, 0.7]), np.ones(2)
    free, dear = [1.0, 1.0, 1.0], [1.0, 2.0, 4.0]
    found = spread(np.array([free, dear]), shares, even, 0.5)
    assert found == pytest.approx([0.7, 0.3])
    # One third of the neurons: all of it leaves half of the way for the other.
    found = spread(np.array([free, dear]), shares, np.array([1.0, 2.0]), 0.5)
    assert found == pytest.approx([0.7, 0.4])
    # Equal layers whose costs rise ever faster share alike.
    assert spread(np.array([dear, dear]), shares, even, 0.5) == pytest.approx([0.5, 0.5])


def test_a_step_that_only_the_next_one_pays_for_is_taken_with_it():
    # The first layer's way to 0.5 costs more than all of its way to 0.7: 1 a tenth on average,
    # which is less than the 1.5 of the second.
    costs = np.array([[0.0, 3.9, 4.0], [0.0, 3.0, 6.0]])
    found = spread(costs, np.array([0.3, 0.5, 0.7]), np.ones(2), 0.5)
    assert found == pytest.approx([0.7, 0.3])


@given(st.integers(0, 2**32 - 1), st.floats(0.3, 0.7))
def test_shares_have_the_mean_and_no_others_of_it_cost_less(seed, mean):
    rng = np.random.default_rng(seed)
    shares, sizes = np.array([0.3, 0.5, 0.7]), rng.uniform(1, 4, 5)
    steps = np.sort(rng.uniform(0, 1, (5, 2)), axis=1)  # convex costs
    costs = np.concatenate([np.zeros((5, 1)), np.cumsum(steps, axis=1)], axis=1)

    def cost(found):
        return sum(np.interp(x, shares, row) for x, row in zip(found, costs, strict=True))

    found = spread(costs, shares, sizes, mean)
    assert found @ sizes == pytest.approx(mean * sizes.sum())
    assert ((found >= 0.3) & (found <= 0.7 + 1e-12)).all()
    for a, b in rng.integers(0, 5, (20, 2)):
        other, move = found.copy(), 0.01
        other[a] += move / sizes[a]
        other[b] -= move / sizes[b]
        if other.min() >= 0.3 and other.max() <= 0.7:
            assert cost(other) >= cost(found) - 1e-9


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "expected a name"),
        ({"name": "ches"}, "did you mean chess"),
        ({"name": "chess", "sparsity": 1}, "below 1, found 1"),
        ({"name": "cats", "sparsity": -0.1}, "at least 0"),
        ({"name": "teal", "sparsity": math.nan}, "found nan"),
        ({"name": "teal", "sparsity": "half"}, "found 'half'"),
        ({"name": "cats", "sparsity": True}, "found True"),
        ({"name": "chess", "attention": 1.5}, "sparsity.attention"),
        ({"name": "cats", "attention": 0.5}, "unknown key in sparsity cats"),
        ({"name": "cats", "allocate": "greed"}, "did you mean greedy"),
        ({"name": "teal", "allocate": ["greedy"]}, "sparsity.allocate"),
    ],
)
def test_what_cannot_be_meant(values, words):
    with pytest.raises(ArgumentError, match=words):
        METHODS.make(values, "sparsity")
    with pytest.raises(ConfigError, match=words):
        read({"sparsity": values})


def test_a_recipe_says_it_all():
    assert set(METHODS) == {"cats", "chess", "teal"}
    recipe = read({"sparsity": {"name": "chess", "sparsity": 0.4}})
    assert recipe.needs_calibration() == "sparsity"
    assert recipe.needs_layers() == ""
    assert recipe.run_settings() == {"sparsity": {"name": "chess", "sparsity": 0.4}}
    assert read({"sparsity": "chess"}).sparsifier() == Chess()
    assert read({"sparsity": "chess"}).run_settings() == {"sparsity": {"name": "chess"}}
    with pytest.raises(ConfigError, match="alone or in a mapping"):
        read({"sparsity": 3})
