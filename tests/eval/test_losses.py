"""Losses against closed forms and float64, and the error of the mean against a simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.eval.losses import Tally, compare_logits, exp, token_losses


def reference(logits, targets):
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    total = np.log(np.exp(wide - top[:, None]).sum(axis=1)) + top
    return total - wide[np.arange(len(targets)), targets]


def test_equal_logits_cost_the_logarithm_of_the_vocabulary():
    for value in (0.0, 1e4, -3e4):
        losses = token_losses(np.full((3, 1000), value, dtype=np.float32), [0, 500, 999])
        np.testing.assert_allclose(losses, math.log(1000), rtol=1e-12)


def test_two_tokens_by_hand():
    losses = token_losses(np.array([[math.log(3), 0.0]], dtype=np.float32), [0])
    assert losses[0] == pytest.approx(-math.log(0.75), abs=1e-7)


@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_against_float64(rows, scale):
    random = np.random.default_rng(rows)
    logits = (random.standard_normal((rows, 3001)) * scale + 100).astype(np.float32)
    targets = random.integers(0, 3001, rows)
    losses = token_losses(logits, targets)
    assert losses.dtype == np.float64
    np.testing.assert_allclose(losses, reference(logits, targets), atol=1e-6, rtol=1e-6)


def test_extremes():
    logits = np.zeros((2, 10), dtype=np.float32)
    logits[0, 3], logits[1, 3] = 3e38, -3e38
    losses = token_losses(logits, [3, 3])
    assert losses[0] == 0
    assert losses[1] == pytest.approx(3e38)
    assert np.isnan(token_losses(np.full((1, 10), np.nan, dtype=np.float32), [0]))[0]


def test_divergence_by_hand():
    """p = (3/4, 1/4) and q = (1/2, 1/2): KL = 3/4 log(3/2) + 1/4 log(1/2)."""
    a = np.array([[math.log(3), 0.0], [0.0, 0.0]], dtype=np.float32)
    b = np.array([[7.0, 7.0], [1.0, 0.0]], dtype=np.float32)
    found = compare_logits(a, b, [1, 0])
    assert found.divergence[0] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    q = math.e / (1 + math.e)
    assert found.divergence[1] == pytest.approx(-math.log(2) - 0.5 * math.log(q * (1 - q)))
    assert found.losses[0] == pytest.approx(math.log(2))
    assert found.reference_losses[0] == pytest.approx(math.log(4))
    assert found.same_top.tolist() == [True, True]
    assert not compare_logits(a[:1], -a[:1], [0]).same_top[0]


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 130),
    scale=st.floats(1e-3, 20),
    noise=st.floats(0, 5),
    shift=st.floats(-100, 100),
)
def test_divergence_against_float64(seed, rows, scale, noise, shift):
    random = np.random.default_rng(seed)
    a = (random.standard_normal((rows, 53)) * scale).astype(np.float32)
    b = (a + random.standard_normal((rows, 53)) * noise + shift).astype(np.float32)
    targets = random.integers(0, 53, rows)
    found = compare_logits(a, b, targets)
    wide = [x.astype(np.float64) for x in (a, b)]
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in wide)
    np.testing.assert_allclose(found.divergence, (np.exp(p) * (p - q)).sum(axis=1), atol=3e-5)
    assert (found.divergence > -3e-5).all()
    np.testing.assert_allclose(found.losses, token_losses(b, targets), atol=1e-9)
    np.testing.assert_allclose(found.reference_losses, token_losses(a, targets), atol=1e-9)
    assert (compare_logits(a, a, targets).divergence == 0).all()


def test_the_mean_is_over_tokens_not_windows():
    tally = Tally()
    for window in ([1.0, 2.0, 3.0], [10.0]):
        tally.add(np.array(window[:1]))
        tally.add(np.array(window[1:]))
        tally.close()
    assert tally.mean == 4.0
    assert tally.tokens == 4
    assert tally.counts == [3, 1]


def test_the_standard_error_is_the_spread_of_the_mean():
    """Over many texts made alike, the mean spreads as much as each text says it does."""
    random = np.random.default_rng(5)
    means, errors = [], []
    for _ in range(400):
        tally = Tally()
        for _ in range(20):
            difficulty = random.normal(3, 0.5)
            tally.add(difficulty + random.standard_normal(random.integers(20, 40)))
            tally.close()
        means.append(tally.mean)
        errors.append(tally.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_one_window_has_no_spread():
    tally = Tally()
    tally.add(np.ones(3))
    tally.close()
    assert tally.standard_error is None


def test_huge_losses_are_infinite_perplexities():
    assert exp(1e6) == math.inf
    assert exp(0) == 1
