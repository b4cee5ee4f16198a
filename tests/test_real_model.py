"""SmolLM2-135M-Instruct whole: against transformers in f32, and after compression by perplexity.

These need a 98 MB model from the package index and the measurement texts, so they run only where
``NYBBLE_DATA`` names the folder with the texts. Perplexities are taken on the first part of the
text only; the README has the figures of all of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import nybble

if TYPE_CHECKING:
    from collections.abc import Callable

DATA = os.environ.get("NYBBLE_DATA")
# Enough windows of 1024 tokens for a stable ratio, few enough for a minute a model.
EVAL_TOKENS = 8 * 1024

pytestmark = [
    pytest.mark.skipif(
        not DATA, reason="needs NYBBLE_DATA (measurement texts) and a downloaded model"
    ),
    pytest.mark.timeout(900),
]


def need(module):
    return pytest.importorskip(module, reason=f"needs {module} (the compress extra)")


@pytest.fixture(scope="session")
def gguf() -> Path:
    from nybble.hub import pull

    path = pull("smollm2-135m-instruct")
    return path if path.is_file() else next(path.glob("*.gguf"))


@pytest.fixture(scope="session")
def reference(gguf: Path) -> Any:
    torch = need("torch")
    transformers = need("transformers")
    need("gguf")
    torch.set_num_threads(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="session")
def off_grid(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same function, its channels rescaled, so that its weights lie on no 4-bit grid."""
    need("torch")
    need("transformers")
    tool = Path(__file__).parent.parent / "benches" / "off_grid.py"
    out = tmp_path_factory.mktemp("off_grid") / "model"
    done = subprocess.run(
        [sys.executable, tool, gguf, out], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def perplexity(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., float]:
    """The perplexity of a model, compressed with the given settings (none: as it is).

    The off-grid model is the same function as the shipped one, whose figure is the measure of both.
    """
    from nybble.eval import perplexity as evaluate

    assert DATA
    text = Path(DATA) / "text" / "wikitext2_raw_valid.jsonl.gz"
    work = tmp_path_factory.mktemp("compressed")
    known: dict[Path, float] = {}

    def of(model: Path, **settings: int) -> float:
        folder = model
        if settings:
            folder = work / "-".join([model.name, *(f"{k}{v}" for k, v in settings.items())])
            nybble.compress(model, folder, progress=False, **settings)
        if folder not in known:
            result = evaluate(nybble.load(folder), text, context=1024, max_tokens=EVAL_TOKENS)
            known[folder] = result.perplexity
        return known[folder]

    return of


PROMPT = "The history of the lighthouse begins in a small fishing village, where every winter the "


@pytest.mark.parametrize("length", [1, 7, 200])
def test_f32_logits_and_greedy_tokens_equal_transformers(
    gguf: Path,
    reference: Any,
    length: int,
) -> None:
    torch = need("torch")
    model = nybble.load(gguf, kv="f32")
    ids = model.tokenizer.encode(PROMPT * 20)[:length]
    assert len(ids) == length
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
        ours = model.forward(ids)
        assert np.abs(ours - expected).max() / np.abs(expected).max() < 1e-4
        greedy = reference.generate(
            torch.tensor([ids]),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
        )[0, length:].tolist()
    session = model.session()
    logits = session.forward(np.asarray(ids, dtype=np.uint32), "last")
    tokens = []
    eos = reference.generation_config.eos_token_id
    for _ in range(64):
        row = logits[-1].copy()
        row[eos] = -np.inf  # as min_new_tokens does
        tokens.append(int(row.argmax()))
        logits = session.forward(np.asarray(tokens[-1:], dtype=np.uint32), "last")
    assert tokens == greedy


def test_off_grid_is_the_same_function(gguf: Path, off_grid: Path) -> None:
    before, after = nybble.load(gguf, kv="f32"), nybble.load(off_grid, kv="f32")
    ids = before.tokenizer.encode(PROMPT)
    expected, ours = before.forward(ids), after.forward(ids)
    assert np.abs(ours - expected).max() / np.abs(expected).max() < 1e-4


def test_w4a8_costs_at_most_six_percent_perplexity(
    gguf: Path, perplexity: Callable[..., float]
) -> None:
    # The weights as they are shipped, on a 4-bit grid with float offsets: this says that nothing is
    # lost where nothing need be, and that 8-bit activations cost little.
    assert perplexity(gguf, weights=4, activations=8, group=32) <= 1.06 * perplexity(gguf)


def test_rounding_off_the_grid_costs_what_is_published(
    gguf: Path, off_grid: Path, perplexity: Callable[..., float]
) -> None:
    # What rounding to nearest does to weights that lie on no grid. README.md has the figure.
    assert perplexity(off_grid, weights=4, activations=8, group=32) <= 1.25 * perplexity(gguf)


def test_w8a8_costs_at_most_one_percent_perplexity(
    gguf: Path, off_grid: Path, perplexity: Callable[..., float]
) -> None:
    assert perplexity(off_grid, weights=8, activations=8, group=32) <= 1.01 * perplexity(gguf)


def test_questions_are_answered_as_often_as_through_transformers(gguf: Path) -> None:
    # lm-evaluation-harness with the same weights in transformers finds 49 and 43 of these hundred.
    from nybble.eval import accuracy

    assert DATA
    questions = Path(DATA) / "qa" / "arc_easy_test.jsonl.gz"
    result = accuracy(nybble.load(gguf, kv="f32"), "arc_easy", questions, limit=100)
    assert result.acc == pytest.approx(0.49, abs=0.02)
    assert result.acc_norm == pytest.approx(0.43, abs=0.02)


def test_the_compressed_model_writes_sensible_text(gguf: Path, tmp_path: Path) -> None:
    nybble.compress(gguf, tmp_path / "w4a8", progress=False)
    model = nybble.load(tmp_path / "w4a8")
    answer = model.chat(
        [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}],
        max_new_tokens=40,
    )
    assert "Paris" in answer.text
    report = json.loads((tmp_path / "w4a8" / "report.json").read_text())
    assert report
