"""A Llama with token pruning, computed plainly: float64 and whole attention matrices."""

import json

import numpy as np
from safetensors.numpy import load_file


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(3, 290, n).tolist()


class Plain:
    """A Llama that prunes its first call's tokens, step by step as the paper says."""

    def __init__(self, folder, policy):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {
            k: v.astype(np.float64) for k, v in load_file(folder / "model.safetensors").items()
        }
        self.policy = policy
        self.heads, self.kv = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.dim = self.config["head_dim"]
        self.caches = [([], []) for _ in range(self.config["num_hidden_layers"])]
        self.seen = 0

    def norm(self, x, name):
        scale = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        return x * scale * self.weights[f"{name}.weight"]

    def turn(self, x, positions):
        """Rotate ``[n, heads, dim]``."""
        half = self.dim // 2
        frequencies = self.config["rope_theta"] ** (-np.arange(half) / half)
        angle = np.asarray(positions)[:, None, None] * frequencies
        a, b = x[..., :half], x[..., half:]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
        )

    def forward(self, tokens, *, prompt=False):
        """Return the logits of the rows that are left."""
        x = self.weights["model.embed_tokens.weight"][tokens]
        rows = np.arange(self.seen, self.seen + len(tokens))
        self.seen += len(tokens)
        steps = list(self.policy.layers)
        for layer, (keys, values) in enumerate(self.caches):
            name = f"model.layers.{layer}"
            h = self.norm(x, f"{name}.input_layernorm")
            q, k, v = (
                (h @ self.weights[f"{name}.self_attn.{part}_proj.weight"].T).reshape(
                    len(x), -1, self.dim
                )
                for part in "qkv"
            )
            if self.policy.positions == "renumbered":
                positions = np.arange(len(keys), len(keys) + len(x))
            else:
                positions = rows
            q, k = self.turn(q, positions), self.turn(k, positions)
            keys.extend(k)
            values.extend(v)
            group = self.heads // self.kv
            all_k = np.repeat(np.array(keys), group, axis=1)
            all_v = np.repeat(np.array(values), group, axis=1)
            scores = np.einsum("qhd,khd->hqk", q, all_k) / np.sqrt(self.dim)
            past = len(keys) - len(x)
            hidden = np.arange(len(keys))[None] > past + np.arange(len(x))[:, None]
            scores[:, hidden] = -np.inf
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            out = np.einsum("hqk,khd->qhd", p, all_v).reshape(len(x), -1)
            x = x + out @ self.weights[f"{name}.self_attn.o_proj.weight"].T
            if prompt and layer in steps:
                x, rows = self.prune(p, x, rows, (steps.index(layer) + 1) / len(steps), len(tokens))
            h = self.norm(x, f"{name}.post_attention_layernorm")
            gate, up = (
                h @ self.weights[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up")
            )
            x = (
                x
                + (gate / (1 + np.exp(-gate)) * up) @ self.weights[f"{name}.mlp.down_proj.weight"].T
            )
        return self.norm(x, "model.norm") @ self.weights["lm_head.weight"].T

    def prune(self, p, x, rows, share, n):
        """Leave the least important rows out."""
        count = round(n * (1 - self.policy.ratio) ** share)
        if self.policy.criterion == "start":
            importance = p[:, :, 0].sum(axis=0)
        else:
            own = p[:, :, p.shape[2] - len(x) :].sum(axis=(0, 1))
            importance = own / (len(x) - np.arange(len(x)))
        always = {len(x) - 1} | ({0} if rows[0] == 0 else set())
        order = sorted(range(len(x)), key=lambda i: (i not in always, -importance[i], i))
        keep = sorted(order[: max(count, len(always))])
        return x[keep], rows[keep]
