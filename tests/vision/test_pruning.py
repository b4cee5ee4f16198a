"""Pruned patches: every method against a plain computation on transformers' own layers."""

import math

import numpy as np
import pytest
import torch

import nybble
from nybble import score
from nybble.errors import ArgumentError, UnsupportedError
from nybble.tokens import (
    PATCH_METHODS,
    AttentionReceived,
    EViT,
    RandomPatches,
    ToMe,
    ZeroTPrune,
)
from vision.encoders import make, save

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread")]

METHODS = {
    "random": RandomPatches(layers=(0, 1), keep=0.6),
    "received": AttentionReceived(layers=(0, 1), keep=(0.75, 0.5)),
    "evit": EViT(layers=(0, 1), keep=0.6),
    "evit-drop": EViT(layers=(1,), keep=0.5, fuse=False),
    "zero": ZeroTPrune(layers=(0, 1), keep=(0.8, 0.7), similar=4),
    "zero-class": ZeroTPrune(layers=(0, 1), keep=0.7, similar=0, class_start=True, iterations=7),
    "zero-plain": ZeroTPrune(layers=(0, 1), keep=0.6, similar=3, extrapolate=False),
    "tome": ToMe(layers=(0, 1, 2), r=(9, 7, 100)),
    "tome-plain": ToMe(layers=(1, 2), r=5, proportional=False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pruning") / "vit"
    place.mkdir()
    save("vit", place)
    return place


def pixels(images, seed=0):
    return np.random.default_rng(seed).standard_normal((images, 3, 24, 24)).astype(np.float32)


def extrapolated(made, changes):
    """Anderson's next guess by what three steps made at most, and how much they changed."""
    made, changes = np.array(made[-3:]), np.array(changes[-3:])
    parts = np.linalg.lstsq(np.diff(changes, axis=0).T, changes[-1], rcond=None)[0]
    guess = np.maximum(made[-1] - parts @ np.diff(made, axis=0), 0)
    return guess / guess.sum()


def settle(attention, scores, steps, extrapolate, gone=()):
    """Votes of every head from `scores` on, until they change by less than 1e-3."""
    found = []
    for graph, start in zip(attention, scores, strict=True):
        old = start.copy()
        old[list(gone)] = 0
        old /= old.sum()
        made, changes = [], []
        for step in range(1, steps + 1):
            new = graph.T @ old
            new[list(gone)] = 0
            new /= new.sum()
            made.append(new)
            changes.append(new - old)
            old = new
            if np.abs(changes[-1]).sum() < 1e-3:
                break
            if extrapolate and 1 < step < steps:
                old = extrapolated(made, changes)
        found.append(old)
    return np.array(found)


def importance(ranks, left, method):
    ranks = np.ascontiguousarray(ranks[:, left], dtype=np.float32)
    return score.emphasise(ranks, score.informative_heads(ranks, method.variances))


def zero_tprune(attention, keys, layer, keep, method):
    """The patches that stay, token 0 being the class token."""
    heads, n, _ = attention.shape
    steps = method.iterations or score.pagerank_iterations(layer, 3)
    start = np.ones((heads, n))
    if method.class_start:
        start[:, 0] = math.sqrt(n)
    ranks = settle(attention, start, steps, method.extrapolate)
    left = list(range(1, n))
    if twins := min(method.similar, (n - 1) // 2):
        matter = importance(ranks, range(n), method)
        order = sorted(left, key=lambda token: (matter[token], -token))
        low, high = order[: len(left) // 2], order[len(left) // 2 :]
        unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        best = (unit[low] @ unit[high].T).max(axis=1)
        gone = {low[i] for i in np.argsort(-best, kind="stable")[:twins]}
        left = [token for token in left if token not in gone]
        ranks = settle(attention, ranks, steps, method.extrapolate, gone)
    count = math.ceil(keep * len(left) - 1e-9)
    matter = importance(ranks, [0, *left], method)[1:]
    best = np.argsort(-matter, kind="stable")[:count]
    return [0, *sorted(left[i] for i in best)]


def tome(keys, sizes, count):
    """For each token left the tokens it is made of, its own first; token 0 is the class token."""
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    even, odd = range(2, len(keys), 2), range(1, len(keys), 2)
    cosines = unit[even] @ unit[odd].T
    members = {token: [token] for token in range(len(keys))}
    for i in sorted(np.argsort(-cosines.max(axis=1), kind="stable")[:count]):
        members[odd[cosines[i].argmax()]] += members.pop(even[i])
    return list(members.values())


def by_head(y):
    return y[0].reshape(y.shape[1], 3, -1).transpose(0, 1)


def each(value, method):
    return value if isinstance(value, tuple) else (value,) * len(method.layers)


def reference(model, values, method):
    """One image through transformers' layers, with tokens taken out as the method says."""
    shares, counts = (each(value, method) for value in method.budget())
    behind = isinstance(method, ZeroTPrune)
    with torch.no_grad():
        x = model.vit.embeddings(torch.from_numpy(values[None]))
        places = list(range(x.shape[1] - 1))
        owners = np.arange(x.shape[1] - 1)
        sizes = torch.ones(x.shape[1])
        for index, layer in enumerate(model.vit.layers):
            normed = layer.layernorm_before(x)
            attend = layer.attention
            q, k, v = (by_head(p(normed)) for p in (attend.q_proj, attend.k_proj, attend.v_proj))
            scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
            if isinstance(method, ToMe) and method.proportional:
                scores = scores + sizes.log()
            weights = torch.softmax(scores, dim=2)
            x = x + attend.o_proj((weights @ v).transpose(0, 1).reshape(1, x.shape[1], -1))
            rows = None  # for each token left its own place and what it is made of
            if index in method.layers:
                step = method.layers.index(index)
                n, graph = x.shape[1], weights.numpy()
                count = math.ceil(shares[step] * (n - 1) - 1e-9)
                if behind:
                    keys = attend.k_proj(normed)[0].numpy()
                    kept = zero_tprune(graph, keys, index, shares[step], method)
                    rows = [(i, {i: 1.0}) for i in kept]
                elif isinstance(method, ToMe):
                    removed = min(counts[step], (n - 1) // 2)
                    groups = tome(k.mean(0).numpy(), sizes, removed)
                    rows = [
                        (g[0], {i: float(sizes[i] / sizes[g].sum()) for i in g}) for g in groups
                    ]
                else:
                    row = graph[:, 0].mean(0)
                    received = row if isinstance(method, EViT) else graph.mean(axis=(0, 1))
                    best = np.argsort(-received[1:], kind="stable")[:count]
                    kept = [0, *sorted(1 + i for i in best)]
                    rows = [(i, {i: 1.0}) for i in kept]
                    if isinstance(method, EViT) and method.fuse:
                        rest = [i for i in range(n) if i not in kept]
                        rows.append((None, {i: float(row[i]) for i in rest}))
            after = layer.mlp(layer.layernorm_after(x)) if behind or rows is None else None
            if after is not None:
                x = x + after
            if rows is not None:
                x = torch.stack([sum(w * x[0, i] for i, w in parts.items()) for _, parts in rows])
                x = x[None]
                sizes = torch.stack([sizes[list(parts)].sum() for _, parts in rows])
                places = [2**32 - 1 if i is None else places[i - 1] for i, _ in rows[1:]]
                into = {i: row - 1 for row, (_, parts) in enumerate(rows) for i in parts}
                owners = [into.get(o + 1, -1) if o >= 0 else -1 for o in owners]
                if not behind:
                    x = x + layer.mlp(layer.layernorm_after(x))
        x = model.vit.layernorm(x)
        return x[0].numpy(), model.classifier(x[:, 0])[0].numpy(), places, owners


@pytest.mark.parametrize("name", [name for name in METHODS if name != "random"])
def test_as_transformers_layers_with_rows_taken_out(name, folder):
    model, ours = make("vit"), nybble.load(folder, threads=2)
    values = pixels(4)
    found = ours.encode(values, tokens=METHODS[name])
    for index in range(4):
        tokens, logits, places, owners = reference(model, values[index], METHODS[name])
        assert found.places[index].tolist() == places
        assert found.owners[index].tolist() == [owner % 2**32 for owner in owners]
        assert np.allclose(found.tokens[index], tokens, atol=1e-4 * np.abs(tokens).max())
        assert np.allclose(found.logits[index], logits, atol=1e-4 * np.abs(logits).max())


@pytest.mark.parametrize("name", METHODS)
def test_batches_threads_and_counts(name, folder):
    method = METHODS[name]
    values = pixels(40)  # more than are computed together
    two, one = nybble.load(folder, threads=2), nybble.load(folder, threads=1)
    many = two.encode(values, tokens=method)
    assert np.array_equal(one.encode(values, tokens=method).tokens, many.tokens)
    assert many.tokens.shape[1] == 1 + many.places.shape[1]
    assert many.tokens.shape[1] < 37
    with pytest.raises(ArgumentError, match="pruned"):
        _ = many.patches
    if name != "random":  # chance goes by an image's place
        for index in (0, 27, 39):
            alone = one.encode(values[index : index + 1], tokens=method)
            assert np.array_equal(alone.tokens[0], many.tokens[index])
            assert np.array_equal(alone.places[0], many.places[index])
    else:
        assert not np.array_equal(many.places[0], many.places[1])
        other = two.encode(values, tokens=RandomPatches(layers=(0, 1), keep=0.6, seed=1))
        assert not np.array_equal(other.places, many.places)


@pytest.mark.parametrize("name", PATCH_METHODS)
def test_all_patches_kept_is_the_model_itself(name, folder):
    ours = nybble.load(folder, threads=2)
    method = {"name": name, "layers": [0, 2]}
    method |= {"r": 0} if name == "tome" else {"keep": 1.0}
    if name == "zero_tprune":
        method["similar"] = 0
    dense, kept = ours.encode(pixels(3)), ours.encode(pixels(3), tokens=method)
    assert np.array_equal(dense.tokens, kept.tokens)
    assert np.array_equal(kept.places, np.tile(np.arange(36), (3, 1)))
    assert np.array_equal(kept.owners, kept.places)
    assert ours.macs(tokens=method) == ours.macs()


@pytest.mark.parametrize("name", ["deit-teacher", "dinov2-registers", "siglip", "clip"])
def test_learned_tokens_stay(name, tmp_path):
    save(name, tmp_path)
    ours = nybble.load(tmp_path, threads=2)
    learned = ours.info["learned_tokens"]
    for method in (
        AttentionReceived((0, 1), 0.5),
        ZeroTPrune((0, 1), 0.5, similar=3),
        ToMe((0, 1), 8),
    ):
        found = ours.encode(pixels(2), tokens=method)
        assert found.tokens.shape[1] == learned + found.places.shape[1]
        assert np.isfinite(found.embedding).all()
        assert ours.macs(tokens=method) < ours.macs()
    if name == "siglip":
        for method in (EViT((0, 1)), ZeroTPrune((0, 1), 0.5, class_start=True)):
            with pytest.raises(UnsupportedError, match="class"):
                ours.encode(pixels(1), tokens=method)


@pytest.mark.parametrize("name", ["siglip", "siglip-classifier"])
def test_a_merged_token_counts_in_the_pooling_as_often_as_its_patches(name, tmp_path):
    model = save(name, tmp_path)
    values = pixels(2)
    found = nybble.load(tmp_path).encode(values, tokens=ToMe((1, 2), (9, 5)))
    plain = nybble.load(tmp_path).encode(values, tokens=ToMe((1, 2), (9, 5), proportional=False))
    for many, weighted in ((found, True), (plain, False)):
        for index in range(2):
            sizes = np.bincount(many.owners[index]) if weighted else 1
            assert weighted is False or sizes.max() > 1
            tokens = torch.from_numpy(many.tokens[index].repeat(sizes, axis=0)[None])
            with torch.no_grad():
                embedding = model.vision_model.head(tokens)
                assert np.allclose(many.embedding[index], embedding[0], atol=1e-4)
                if name == "siglip-classifier":
                    logits = model.classifier(tokens.mean(dim=1))
                    assert np.allclose(many.logits[index], logits[0], atol=1e-4)


def test_compressed_models_prune_as_well(folder, tmp_path):
    recipe = {"weights": {"bits": 8}, "activations": {"bits": 8}}
    nybble.compress(folder, tmp_path / "small", recipe=recipe, progress=False)
    small, large = nybble.load(tmp_path / "small"), nybble.load(folder)
    for method in (METHODS["received"], METHODS["zero"]):
        a, b = small.encode(pixels(4), tokens=method), large.encode(pixels(4), tokens=method)
        assert a.tokens.shape == b.tokens.shape
        shared = [len(set(x) & set(y)) / len(x) for x, y in zip(a.places, b.places, strict=True)]
        assert np.mean(shared) > 0.8


def test_macs_by_hand(folder):
    ours = nybble.load(folder)
    layer = 4 * 48 * 48 + 2 * 48 * 80

    def attention(n):
        return 2 * n * n * 48

    embed = 36 * 48 * 48
    assert ours.macs() == ours.info["macs"] == embed + 3 * (37 * layer + attention(37))
    # 18 of 36 patches stay behind layer 1: its feed-forward block has 19 tokens already.
    pruned = ours.macs(tokens=AttentionReceived((1,), 0.5))
    mlp = 2 * 48 * 80
    wanted = embed + 2 * (37 * layer + attention(37)) - 18 * mlp + 19 * layer + attention(19)
    assert pruned == wanted
    assert ours.macs(48) > 3 * ours.macs()


def test_schedules_that_mean_nothing(folder):
    ours = nybble.load(folder)
    for wrong, error in [
        (AttentionReceived((3,), 0.5), ArgumentError),
        (AttentionReceived((1, 0), 0.5), ArgumentError),
        (AttentionReceived((), 0.5), ArgumentError),
        (AttentionReceived((0, 1), 0.0), ArgumentError),
        (AttentionReceived((0, 1), (0.5,)), ArgumentError),
        (AttentionReceived((0, 1), (0.5, float("nan"))), ArgumentError),
        (AttentionReceived((0,), 1.5), ArgumentError),
        (ZeroTPrune((0,), 0.5, similar=-1), ArgumentError),
        (ZeroTPrune((0,), 0.5, variances=(1.0, 0.5)), ArgumentError),
        (ToMe((0,), -1), ArgumentError),
        (ToMe((0, 1), (1,)), ArgumentError),
        (ToMe((0,), 0.5), ArgumentError),
        ("zero-tprune", ArgumentError),
        ({"layers": [0]}, ArgumentError),
        ({"name": "evit", "rate": 0.5}, ArgumentError),
        (7, ArgumentError),
    ]:
        with pytest.raises(error):
            ours.encode(pixels(1), tokens=wrong)
    # The least that a schedule leaves is one patch.
    least = ours.encode(pixels(1), tokens=AttentionReceived((0, 1), 1e-6))
    assert least.tokens.shape[1] == 2
    # What is compared leaves at most half; the other half stays whatever is asked for.
    for method in (ToMe((0,), 10**6), ZeroTPrune((0,), 1.0, similar=10**6)):
        assert ours.encode(pixels(1), tokens=method).tokens.shape[1] == 1 + 18
