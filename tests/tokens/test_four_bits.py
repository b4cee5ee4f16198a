"""Tokens of 4 bits among tokens of 8: the core against a plain computation."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nybble
from nybble.tokens import TokenPolicy
from plain import Plain, ids
from tiny import write_llama

LAYERS = (1, 2)


class Rounded(Plain):
    """As `Plain`, with the inputs of linears rounded in groups of 32: to 8 bits, some rows to 4."""

    def norm(self, x, name):
        x = super().norm(x, name)
        if "attention" in name:  # the input of gate and up
            return self.rounded(x)
        return self.rounded(x, low=()) if "input" in name else x

    def rounded(self, x, low=None):
        levels = np.full(len(x), 127.0)
        low = self.low if low is None else low
        levels[list(low)] = 7
        groups = x.reshape(len(x), -1, 32)
        scale = np.abs(groups).max(axis=-1, keepdims=True) / levels[:, None, None]
        return (np.round(groups / scale) * scale).reshape(x.shape)

    def forward(self, tokens):
        x = self.weights["model.embed_tokens.weight"][tokens]
        n, self.low = len(x), set()
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"

            def linear(part, h, name=name):
                return h @ self.weights[f"{name}.{part}_proj.weight"].T

            h = self.norm(x, f"{name}.input_layernorm")
            q, k, v = (linear(f"self_attn.{part}", h).reshape(n, -1, self.dim) for part in "qkv")
            q, k = self.turn(q, np.arange(n)), self.turn(k, np.arange(n))
            group = self.heads // self.kv
            k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
            scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(self.dim)
            scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            if layer in LAYERS:
                count = round(
                    n * (1 - self.policy.ratio) ** ((LAYERS.index(layer) + 1) / len(LAYERS))
                )
                gives = p[:, :, 0].sum(axis=0)
                gives[[0, n - 1]] = np.inf
                gives[list(self.low)] = -np.inf
                self.low = set(np.argsort(-gives, kind="stable")[count:].tolist())
            x = x + linear(
                "self_attn.o", self.rounded(np.einsum("hqk,khd->qhd", p, v).reshape(n, -1))
            )
            h = self.norm(x, f"{name}.post_attention_layernorm")
            gate, up = linear("mlp.gate", h), linear("mlp.up", h)
            x = x + linear("mlp.down", self.rounded(gate / (1 + np.exp(-gate)) * up))
        return super().norm(x, "model.norm") @ self.weights["lm_head.weight"].T


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama whose linears are 4-bit codes already, and the same quantized: no weight changes."""
    place = tmp_path_factory.mktemp("four")
    folder = write_llama(place / "llama", layers=4, hidden=64, inner=96)
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(4)
    for name, value in tensors.items():
        if "proj" in name:
            codes = rng.integers(-7, 8, value.shape)
            codes[:, ::32] = 7  # every group reaches the largest code
            tensors[name] = (codes * 2.0**-5).astype(np.float32)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    recipe = {
        "weights": {"symmetric": True},
        "embedding": {"bits": 16},
        "head": {"bits": 16},
        "floats": "auto",
    }
    nybble.compress(folder, place / "w4a8", recipe=recipe, progress=False)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):  # written as bfloat16
        tensors[name] = (tensors[name].view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder, place / "w4a8"


def test_some_rows_have_four_bits_from_a_layer_on(folders):
    floats, quantized = folders
    tokens = ids(100)
    policy = TokenPolicy(0.5, layers=LAYERS, action="4bit")
    model = nybble.load(quantized, 2, kv="f32")
    session = model.session(tokens=policy)
    found = session.forward(tokens, "all", prompt=True)  # nothing is dropped: all rows are there
    assert session.layer_tokens == [100] * 4
    # One code at a tie changes all that follows a little, and rounding to 4 bits makes much of
    # it. So not the logits are compared, but which rows are off, and by how much.
    plain = Rounded(floats, policy)
    expected = np.abs(plain.forward(tokens) - Rounded(floats, TokenPolicy(0.0)).forward(tokens))
    off = np.abs(found - model.forward(tokens)).mean(axis=1)
    low = sorted(plain.low)
    assert len(low) == 50
    assert sorted(np.argsort(off)[50:]) == low
    assert off[low].mean() == pytest.approx(expected[low].mean(), rel=0.2)
    assert off[: low[0]].max() == 0


def test_what_follows_has_eight_bits(folders):
    model = nybble.load(folders[1], 2)
    session = model.session(tokens={"ratio": 0.9, "action": "4bit"})
    other = model.session()
    session.forward(ids(80), prompt=True)
    other.forward(ids(80))
    assert not np.array_equal(session.forward([5]), other.forward([5]))
    # Going back to before the prompt leaves no flag behind.
    assert session.truncate(79) == 0
    other.truncate(0)
    assert np.array_equal(session.forward(ids(80), "all"), other.forward(ids(80), "all"))


def test_threads(folders):
    found = [
        nybble.load(folders[1], threads, tokens={"ratio": 0.5, "action": "4bit"})
        .session()
        .forward(ids(90), prompt=True)
        .tobytes()
        for threads in (1, 2, 3)
    ]
    assert found[0] == found[1] == found[2]
    assert json.loads(nybble.load(folders[1]).raw.info())["tokens"] is None
