"""Families whose attention goes by position: keeping positions is refused by name."""

import pytest

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("transformers", reason="needs transformers")

import nybble  # noqa: E402
from families import make, prompts  # noqa: E402
from nybble.errors import UnsupportedError  # noqa: E402
from nybble.tokens import TokenPolicy  # noqa: E402


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("mistral-window", "window of 16 tokens"),
        ("gemma3", "window of 16 tokens"),
        ("bloom", "ALiBi"),
        ("opt", None),
        ("opt-post-norm-narrow", None),
        ("gpt2", None),
        ("qwen3", None),
    ],
)
def test_every_family_prunes_or_says_why_not(family, words, tmp_path):
    make(family).save_pretrained(tmp_path)
    (prompt,) = prompts(90)
    if words is None:
        kept = nybble.load(tmp_path, 2, tokens=TokenPolicy(0.5, layers=(0,)))
        assert kept.generate(prompt, 5, ignore_end=True).metrics["layer_tokens"][1] == 45
    else:
        with pytest.raises(UnsupportedError, match=words):
            nybble.load(tmp_path, 2, tokens=TokenPolicy(0.5, layers=(0,)))
    renumbered = TokenPolicy(0.5, "received", layers=(0,), positions="renumbered")
    found = []
    for threads in (1, 3):
        model = nybble.load(tmp_path, threads, tokens=renumbered)
        result = model.generate(prompt, 20, ignore_end=True)
        assert result.metrics["layer_tokens"][1] == 45
        found.append(result.tokens)
    assert found[0] == found[1]


def test_a_window_as_wide_as_the_context_is_none(tmp_path):
    make("mistral-window").save_pretrained(tmp_path)
    policy = TokenPolicy(0.5, layers=(0,), min_prompt=8)
    model = nybble.load(tmp_path, 2, context=16, tokens=policy)
    (prompt,) = prompts(10)
    assert model.generate(prompt, 3, ignore_end=True).metrics["layer_tokens"][1] == 5
