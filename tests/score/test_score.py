"""Scores against networkx, NumPy and graphs whose answer is known."""

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble import score
from nybble.errors import ArgumentError


def attention(heads, n, seed=0, sharp=2.0):
    """Random attention of float32 whose rows sum to 1."""
    logits = np.random.default_rng(seed).standard_normal((heads, n, n)) * sharp
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    return (weights / weights.sum(axis=2, keepdims=True)).astype(np.float32)


def first_eigenvector(matrix):
    """The one whose shares a matrix with rows of sum 1 leaves as they are."""
    values, vectors = np.linalg.eig(np.asarray(matrix).T)
    top = np.real(vectors[:, np.argmax(np.real(values))])
    return top / top.sum()


@pytest.mark.parametrize("damping", [0.5, 0.85, 0.99])
@pytest.mark.parametrize("n", [2, 17, 60])
def test_pagerank_of_networkx(n, damping):
    graph = attention(1, n, seed=n)
    directed = networkx.from_numpy_array(graph[0].astype(float), create_using=networkx.DiGraph)
    # Its `pagerank` wants SciPy; this is the matrix whose first eigenvector it computes.
    wanted = first_eigenvector(networkx.google_matrix(directed, alpha=damping))
    found = score.pagerank(graph, damping=damping, iterations=500, tolerance=1e-7)
    assert found.iterations[0] < 500
    assert np.allclose(found.scores[0], wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("n", [1, 8, 197])
def test_without_damping_the_stationary_distribution(n):
    graph = attention(3, n, seed=1)
    found = score.pagerank(graph, iterations=200, tolerance=0)
    assert found.iterations == (200, 200, 200)
    for head, scores in zip(graph.astype(np.float64), found.scores, strict=True):
        assert np.allclose(scores, first_eigenvector(head), atol=1e-6)


def reluctant(n):
    """Two groups that hardly look at each other: plain steps settle slowly."""
    graph = attention(1, n, seed=3)[0]
    half = n // 2
    graph[:half, half:] *= 0.02
    graph[half:, :half] *= 0.05
    return (graph / graph.sum(axis=1, keepdims=True))[None]


@pytest.mark.parametrize("damping", [0.9, 1.0])
def test_extrapolated_steps_reach_the_same_scores_sooner(damping):
    graph = reluctant(40)
    how = {"iterations": 500, "tolerance": 1e-6, "damping": damping}
    plain = score.pagerank(graph, **how)
    found = score.pagerank(graph, extrapolate=True, **how)
    assert found.iterations[0] < plain.iterations[0] / 2
    wanted = first_eigenvector(damping * graph[0].astype(float) + (1 - damping) / 40)
    assert np.allclose(found.scores[0], wanted, atol=1e-6)
    assert found.scores.sum() == pytest.approx(1, abs=1e-6)
    recorded = score.pagerank(score.AttentionGraph(graph), extrapolate=True, **how)
    assert np.allclose(recorded.scores, found.scores, rtol=2e-2)


@settings(max_examples=50, deadline=None)
@given(
    heads=st.integers(1, 3),
    n=st.integers(1, 30),
    steps=st.integers(0, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_extrapolated_scores_are_shares(heads, n, steps, seed):
    graph = attention(heads, n, seed)
    graph[0, :, 0] = 0  # one that nobody looks at
    graph[0] /= np.maximum(graph[0].sum(axis=1, keepdims=True), 1e-30)
    how = {"iterations": steps, "tolerance": 0, "extrapolate": True}
    found = score.pagerank(graph, threads=1, **how)
    assert (found.scores >= 0).all()
    assert n == 1 or np.allclose(found.scores.sum(axis=1), 1, atol=1e-5)
    assert np.array_equal(found.scores, score.pagerank(graph, threads=3, **how).scores)
    if steps < 3:  # there is nothing to extrapolate from
        assert np.array_equal(
            found.scores, score.pagerank(graph, iterations=steps, tolerance=0).scores
        )


@settings(max_examples=50, deadline=None)
@given(
    heads=st.integers(1, 5),
    n=st.integers(1, 40),
    steps=st.integers(0, 12),
    seed=st.integers(0, 2**32 - 1),
    class_token=st.booleans(),
)
def test_steps_as_numpy_takes_them(heads, n, steps, seed, class_token):
    graph = attention(heads, n, seed)
    start = np.ones(n)
    if class_token:
        start[n // 2] = np.sqrt(n)
    wanted = np.tile(start / start.sum(), (heads, 1))
    for _ in range(steps):
        wanted = np.einsum("hij,hi->hj", graph.astype(np.float64), wanted)
    place = n // 2 if class_token else None
    found = score.pagerank(graph, iterations=steps, tolerance=0, class_token=place)
    assert found.iterations == (steps,) * heads
    assert np.allclose(found.scores, wanted, rtol=1e-5, atol=1e-7)
    assert np.allclose(found.scores.sum(axis=1), 1, rtol=1e-5)
    # The order of tokens is nothing to the graph, nor are threads or the array's layout.
    order = np.random.default_rng(seed).permutation(n)
    mixed = np.ascontiguousarray(graph[:, order][:, :, order])
    if not class_token:
        again = score.pagerank(mixed, iterations=steps, tolerance=0)
        assert np.allclose(again.scores, found.scores[:, order], rtol=1e-5, atol=1e-7)
    for threads in (1, 3):
        other = score.pagerank(
            np.asfortranarray(graph),
            iterations=steps,
            tolerance=0,
            class_token=place,
            threads=threads,
        )
        assert np.array_equal(other.scores, found.scores)


@pytest.mark.parametrize(("n", "coarse"), [(1, False), (60, False), (197, False), (900, True)])
def test_small_graphs_rank_as_plain_ones(n, coarse):
    plain = attention(6, n, seed=n)
    graph = score.AttentionGraph(plain, threads=2)
    assert graph.shape == (6, n)
    for how in ({"iterations": 5, "tolerance": 0}, {"tolerance": 1e-3}, {"class_token": 0}):
        found, wanted = (score.pagerank(g, **how).scores for g in (graph, plain))
        assert np.allclose(found.sum(axis=1), 1, atol=1e-5)
        # A weight is off by at most a 16th or a 512th of it, and hundreds of them are added up.
        assert np.allclose(found, wanted, rtol=3e-2 if coarse else 2e-3)
        order, other = (
            np.argsort(np.argsort(scores, axis=1), axis=1) for scores in (found, wanted)
        )
        for a, b in zip(order, other, strict=True):
            assert n == 1 or np.corrcoef(a, b)[0, 1] > 0.999
    one = score.pagerank(score.AttentionGraph(plain, threads=1), threads=1).scores
    assert np.array_equal(one, score.pagerank(graph, threads=2).scores)


def test_iterations_of_the_paper():
    assert [score.pagerank_iterations(layer, 12) for layer in (0, 2, 3, 7, 8, 11)] == [
        30,
        30,
        5,
        5,
        1,
        1,
    ]


def test_plain_sums():
    graph = attention(4, 50)
    assert np.allclose(score.received(graph), graph.mean(axis=(0, 1)), rtol=1e-5)
    assert np.allclose(score.query_row(graph), graph[:, 0].mean(axis=0), rtol=1e-6)
    assert np.allclose(score.query_row(graph, 49), graph[:, 49].mean(axis=0), rtol=1e-6)
    # A step of PageRank from equal scores is attention received, head by head.
    step = score.pagerank(graph, iterations=1, tolerance=0).scores
    assert np.allclose(step.mean(axis=0), score.received(graph), rtol=1e-5)


def test_heads():
    n = 197
    even = np.full(n, 1 / n)
    lonely = np.eye(n)[3]
    useful = np.linspace(0.5, 1.5, n) / n
    scores = np.stack([even, lonely, useful]).astype(np.float32)
    assert score.informative_heads(scores) == [False, False, True]
    assert score.informative_heads(scores[:2]) == [True, True]
    assert score.informative_heads(scores, (0.0, 1e9)) == [True, True, True]
    kept = score.emphasise(scores, [False, False, True])
    assert np.allclose(kept, scores[2], rtol=1e-6)
    everything = score.emphasise(scores)
    assert np.allclose(everything, np.sqrt((scores**2).mean(axis=0)), rtol=1e-5)
    assert everything.argmax() == 3  # one head is enough


@settings(max_examples=40, deadline=None)
@given(
    a=st.integers(0, 300), b=st.integers(1, 150), dim=st.integers(1, 40), seed=st.integers(0, 999)
)
def test_cosines_and_best_matches(a, b, dim, seed):
    numbers = np.random.default_rng(seed)
    left = numbers.standard_normal((a, dim)).astype(np.float32)
    right = numbers.standard_normal((b, dim)).astype(np.float32)
    exact = left.astype(float) @ right.astype(float).T
    exact /= np.linalg.norm(left.astype(float), axis=1)[:, None]
    exact /= np.linalg.norm(right.astype(float), axis=1)
    assert np.allclose(score.cosines(left, right), exact, atol=2e-6)
    places, values = score.best_matches(left, right)
    assert np.allclose(values, exact.max(axis=1, initial=-2), atol=2e-6)
    assert np.allclose(exact[np.arange(a), places.astype(int)], values, atol=2e-6)


def bipartite_by_numpy(features, count, protected):
    """ToMe's matching, written out."""
    n = len(features)
    even = [i for i in range(0, n, 2) if i >= protected]
    odd = [i for i in range(1, n, 2) if i >= protected]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    table = unit[even] @ unit[odd].T
    order = np.argsort(-table.max(axis=1), kind="stable")[:count]
    return {(even[i], odd[int(table[i].argmax())]) for i in order}


@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize(("n", "count"), [(197, 16), (50, 25), (7, 2), (4, 100)])
def test_bipartite(n, count, protected):
    features = np.random.default_rng(n).standard_normal((n, 24)).astype(np.float32)
    going, into = score.bipartite(features, count, protected=protected)
    wanted = bipartite_by_numpy(features.astype(float), count, protected)
    assert set(zip(going.tolist(), into.tolist(), strict=True)) == wanted
    assert going.tolist() == sorted(going)
    assert len(going) <= (n - protected + 1) // 2


@settings(max_examples=60, deadline=None)
@given(scores=st.lists(st.floats(width=32), max_size=60), k=st.integers(0, 70))
def test_top_k(scores, k):
    array = np.array(scores, dtype=np.float32)
    order = np.argsort(-np.where(np.isnan(array), -np.inf, array), kind="stable")
    assert score.top_k(array, k).tolist() == sorted(order[:k])


def test_graphs_that_are_none():
    with pytest.raises(ArgumentError, match="as many keys as queries"):
        score.AttentionGraph(np.ones((1, 2, 3), np.float32))
    graph = score.AttentionGraph(attention(2, 5))
    for wrong in ({"damping": 2.0}, {"class_token": 5}, {"tolerance": -1.0}):
        with pytest.raises(ArgumentError):
            score.pagerank(graph, **wrong)
    empty = score.AttentionGraph(np.ones((3, 0, 0), np.float32))
    assert score.pagerank(empty).scores.shape == (3, 0)


def test_mistakes():
    graph = attention(2, 6)
    for wrong in (
        lambda: score.pagerank(graph[:, :5]),
        lambda: score.pagerank(graph, damping=1.1),
        lambda: score.pagerank(graph, tolerance=float("nan")),
        lambda: score.pagerank(graph, iterations=-1),
        lambda: score.pagerank(graph, class_token=6),
        lambda: score.pagerank(graph, class_token=0, class_factor=0.0),
        lambda: score.received(graph[:, :, :5]),
        lambda: score.query_row(graph, 6),
        lambda: score.query_row(graph, -1),
        lambda: score.emphasise(graph[0], [True]),
        lambda: score.emphasise(graph[0], [False] * 6),
        lambda: score.cosines(graph[0], graph[0, :, :5]),
        lambda: score.best_matches(graph[0], graph[0, :0]),
        lambda: score.bipartite(graph[0], -1),
        lambda: score.top_k(graph[0, 0], 1.5),
        lambda: score.pagerank_iterations(0, 0),
    ):
        with pytest.raises(ArgumentError):
            wrong()
    assert score.pagerank(np.zeros((0, 3, 3), np.float32)).scores.shape == (0, 3)
    assert score.pagerank(np.zeros((2, 0, 0), np.float32)).scores.shape == (2, 0)
    with pytest.raises(TypeError):
        score.pagerank(graph.astype(np.float64))
