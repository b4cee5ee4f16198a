"""The adapter for lm-evaluation-harness, and that the harness and nybble give the same figures."""

import json
import re
from importlib.metadata import entry_points

import numpy as np
import pytest

import nybble
from nybble.errors import ArgumentError, ContextError, UnsupportedError
from nybble.eval.choices import score
from nybble.eval.tasks import find, read_items
from tiny import write_llama, write_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval (the eval extra)")

pytestmark = [
    pytest.mark.timeout(120),
    # The harness, datasets and what they import announce their own deprecations.
    pytest.mark.filterwarnings("ignore"),
]

WORDS = ["the", "cat", "sat", "on", "a", "mat", "small", "model", "runs", "hello", "CPU", "123"]
#: The prompts of the harness's own tasks, for rows of the plain form.
PROMPTS = {
    "arc_easy": "Question: {{question}}\nAnswer:",
    "piqa": "Question: {{question}}\nAnswer:",
    "boolq": "{{passage}}\nQuestion: {{question}}?\nAnswer:",
    "openbookqa": "{{question}}",
    "siqa": "Q: {{question}}\nA:",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of a hundred questions, made up."""
    random = np.random.default_rng(8)

    def words(most):
        return " ".join(random.choice(WORDS, random.integers(1, most + 1)))

    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for _ in range(100):
            row = {
                "passage": words(30),
                "question": words(12),
                "choices": [words(6) for _ in range(4)],
                "answer": int(random.integers(4)),
            }
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def adapter(tiny):
    from nybble.eval.harness import NybbleLM

    return NybbleLM(tiny)


@pytest.fixture(scope="module")
def original(tiny_folder):
    """The harness's own model class on the same folder, through transformers."""
    torch = pytest.importorskip("torch", reason="needs torch (the compress extra)")
    pytest.importorskip("transformers", reason="needs transformers (the compress extra)")
    from lm_eval.models.huggingface import HFLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so little work is done sooner by one
    yield HFLM(pretrained=str(tiny_folder), device="cpu", dtype="float32", batch_size=50)
    torch.set_num_threads(threads)


def evaluate(model, *configs, **options):
    """Run tasks through the harness; return each task's figures and its questions in order."""
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model,
        tasks=list(configs),
        bootstrap_iters=0,
        **options,
        task_manager=TaskManager(include_defaults=False),  # indexing its own takes long
    )
    by_number = {
        name: sorted(samples, key=lambda sample: sample["doc_id"])
        for name, samples in found["samples"].items()
    }
    return found["results"], by_number


def config(name, path, **rest):
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        **rest,
    }


def choices_config(task, path):
    return config(
        task,
        path,
        output_type="multiple_choice",
        doc_to_text=PROMPTS[task],
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
    )


@pytest.mark.parametrize("through", ["adapter", "original"])
def test_every_question_scores_alike(request, tiny, rows, through):
    """A hundred questions a task: the harness, driving nybble or transformers, and nybble alone."""
    model = request.getfixturevalue(through)
    results, samples = evaluate(model, *(choices_config(task, rows) for task in PROMPTS))
    for task in PROMPTS:
        own = list(score(tiny, read_items(find(task), rows)))
        assert len(samples[task]) == len(own) == 100
        for sample, scored in zip(samples[task], own, strict=True):
            logprobs = [float(response[0][0]) for response in sample["resps"]]
            np.testing.assert_allclose(scored.logprobs, logprobs, rtol=1e-4, atol=1e-3)
            greedy = [str(response[0][1]) == "True" for response in sample["resps"]]
            assert list(scored.greedy) == greedy
            assert sample["acc"] == scored.hit
            assert sample["acc_norm"] == scored.hit_norm
        accuracy = nybble.eval.accuracy(tiny, task, rows)
        assert results[task]["acc,none"] == pytest.approx(accuracy.acc)
        assert results[task]["acc_norm,none"] == pytest.approx(accuracy.acc_norm)


def test_other_kinds_of_request(adapter, original, rows, tiny, tmp_path):
    """Rolling likelihoods and generated texts are those transformers gives."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(line + "\n" for line in rows.read_text().splitlines()[:6]))
    configs = (
        config(
            "rolling",
            few,
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{passage}}",
            metric_list=[
                {
                    "metric": "word_perplexity",
                    "aggregation": "weighted_perplexity",
                    "higher_is_better": False,
                }
            ],
        ),
        config(
            "generated",
            few,
            output_type="generate_until",
            doc_to_text="{{question}}",
            doc_to_target="{{passage}}",
            generation_kwargs={"until": ["a", "t"], "max_gen_toks": 12, "do_sample": False},
            metric_list=[
                {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
            ],
        ),
    )
    results, samples = evaluate(adapter, *configs)
    others, expected = evaluate(original, *configs)
    word = "word_perplexity,none"
    assert results["rolling"][word] == pytest.approx(others["rolling"][word], rel=1e-4)
    texts, others = (
        # A random model writes bytes that are no text; how many marks stand for them may differ.
        [re.sub("\ufffd+", "?", sample["resps"][0][0]) for sample in side["generated"]]
        for side in (samples, expected)
    )
    assert texts == others
    assert len(set(texts)) > 3


def test_texts_longer_than_the_context(tiny, original):
    """A rolling likelihood predicts every token once, whatever the context."""
    from types import SimpleNamespace as Request

    from nybble.eval.harness import NybbleLM

    text = "the cat sat on the mat and a small model runs fast " * 3
    short = NybbleLM(tiny, max_length=16)
    original_length, original._max_length = original._max_length, 16
    try:
        expected = original.loglikelihood_rolling([Request(args=(text,))], disable_tqdm=True)
    finally:
        original._max_length = original_length
    found = short.loglikelihood_rolling([Request(args=(text,))], disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)
    whole = NybbleLM(tiny).loglikelihood_rolling([Request(args=(text,))], disable_tqdm=True)
    assert found != pytest.approx(whole, rel=1e-5)


def test_it_is_known_by_its_name(tiny, tiny_folder, rows):
    from lm_eval.api.registry import get_model

    from nybble.eval.harness import NybbleLM

    assert get_model("nybble") is NybbleLM
    model = NybbleLM.create_from_arg_string(f"path={tiny_folder},threads=1,max_length=20")
    assert model.max_length == 20
    assert model.model.info["threads"] == 1
    results, _ = evaluate(
        "nybble",
        choices_config("piqa", rows),
        model_args={"path": str(tiny_folder)},
        device="cpu",
        limit=10,
    )
    expected = nybble.eval.accuracy(tiny, "piqa", rows, limit=10)
    assert results["piqa"]["acc,none"] == pytest.approx(expected.acc)
    (point,) = entry_points(group="lm_eval.models", name="nybble")
    assert point.load() is NybbleLM


def test_control_tokens_and_chats(adapter, tmp_path):
    assert adapter.eot_token_id == 2
    assert adapter.prefix_token_id == 0
    assert adapter.tok_encode("<|im_end|>") == [2]
    chat = adapter.apply_chat_template([{"role": "user", "content": "the cat"}])
    assert chat == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    assert adapter.tok_encode(chat)[0] == 1
    assert "im_start" in adapter.chat_template(True)
    assert adapter.chat_template(False) is None
    with pytest.raises(UnsupportedError, match="no chat template 'tools'"):
        adapter.chat_template("tools")
    folder = write_llama(tmp_path / "begins")
    write_tokenizer(folder, begin=True)
    begins = type(adapter)(folder)
    assert begins.tok_encode("the cat")[0] == 0
    assert begins.tok_encode("<|endoftext|>the cat") == begins.tok_encode("the cat")


def test_requests_that_cannot_be_met(adapter):
    from types import SimpleNamespace as Request

    with pytest.raises(UnsupportedError, match="device: expected cpu, found 'cuda:0'"):
        type(adapter)(adapter.model, device="cuda:0")
    with pytest.raises(ArgumentError, match="found beams, length_penalty"):
        adapter.generate_until([Request(args=("the", {"beams": 2, "length_penalty": 1.0}))])
    with pytest.raises(ContextError, match="max_gen_toks: expected fewer than the 512"):
        adapter.generate_until([Request(args=("the", {"max_gen_toks": 512}))])
