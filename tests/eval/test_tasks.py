"""Reading questions: what is asked of a model, and what is said of a file that is damaged."""

import gzip
import json

import pytest

from nybble.errors import ArgumentError, FormatError, MissingFileError
from nybble.eval.tasks import TASKS, find, locate, read_items

PLAIN = {"question": "What is a cat?", "choices": ["an animal", "a stone"], "answer": 0}
HELLASWAG = {
    "ind": 4,
    "activity_label": "Removing ice from car",
    "ctx_a": "A man scrapes  the window. [header] Then [title] he looks.",
    "ctx_b": "the Man",
    "endings": [" gets in [step] and drives. ", "sings.", "[title] flies.", "sleeps."],
    "label": 3,
}
WINOGRANDE = {
    "qID": "1",
    "sentence": "The cat did not fit on the mat because _ was too big _ really.",
    "option1": "the cat",
    "option2": "the mat",
    "answer": "1",
}


def write(path, *rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize(
    ("task", "prompt"),
    [
        ("arc_easy", "Question: What is a cat?\nAnswer:"),
        ("arc_challenge", "Question: What is a cat?\nAnswer:"),
        ("piqa", "Question: What is a cat?\nAnswer:"),
        ("openbookqa", "What is a cat?"),
        ("siqa", "Q: What is a cat?\nA:"),
    ],
)
def test_plain_questions(tmp_path, task, prompt):
    (item,) = read_items(find(task), write(tmp_path / "a.jsonl", PLAIN))
    assert item.prompts == (prompt, prompt)
    assert item.endings == (" an animal", " a stone")
    assert (item.choices, item.answer) == (("an animal", "a stone"), 0)


def test_boolq(tmp_path):
    row = {
        "passage": "Cats {are} animals.",  # braces of the text are no fields
        "question": "is a cat an animal",
        "choices": ["yes", "no"],
        "answer": 0,
    }
    (item,) = read_items(find("boolq"), write(tmp_path / "a.jsonl.gz", row))
    assert item.prompts[0] == "Cats {are} animals.\nQuestion: is a cat an animal?\nAnswer:"
    assert item.endings == (" yes", " no")


def test_hellaswag(tmp_path):
    other = {**HELLASWAG, "label": "0", "ctx_b": ""}
    first, second = read_items(find("hellaswag"), write(tmp_path / "a.jsonl", HELLASWAG, other))
    prompt = "Removing ice from car: A man scrapes the window. Then. he looks. The man"
    assert first.prompts[0] == prompt
    assert first.choices == ("gets in and drives.", "sings.", " flies.", "sleeps.")
    assert first.endings[0] == " gets in and drives."
    assert (first.answer, second.answer) == (3, 0)


def test_winogrande(tmp_path):
    rows = WINOGRANDE, {**WINOGRANDE, "answer": "2"}
    first, second = read_items(find("winogrande"), write(tmp_path / "a.jsonl", *rows))
    start = "The cat did not fit on the mat because "
    assert first.prompts == (start + "the cat", start + "the mat")
    assert first.endings == (" was too big _ really.",) * 2
    assert (first.answer, second.answer) == (0, 1)


def test_the_readers_are_the_harnesses(tmp_path):
    """The harness's own functions, on rows of the published form."""
    pytest.importorskip("lm_eval", reason="needs lm-eval (the eval extra)")
    from lm_eval.tasks.hellaswag.utils import preprocess
    from lm_eval.tasks.winogrande import preprocess_winogrande as harness

    (item,) = read_items(find("hellaswag"), write(tmp_path / "a.jsonl", HELLASWAG))
    text = HELLASWAG["activity_label"] + ": " + HELLASWAG["ctx_a"]
    assert item.prompts[0] == preprocess(text + " " + HELLASWAG["ctx_b"].capitalize())
    assert list(item.choices) == [preprocess(ending) for ending in HELLASWAG["endings"]]
    (item,) = read_items(find("winogrande"), write(tmp_path / "b.jsonl", WINOGRANDE))
    assert list(item.prompts) == harness.doc_to_choice(WINOGRANDE)
    assert item.endings[0] == " " + harness.doc_to_target(WINOGRANDE)
    assert item.answer == harness.doc_to_text(WINOGRANDE)


def test_the_first_so_many(tmp_path):
    path = write(tmp_path / "a.jsonl", PLAIN, {**PLAIN, "answer": 1}, "not json")
    assert [item.answer for item in read_items(find("piqa"), path, 2)] == [0, 1]
    with pytest.raises(FormatError, match="line 3: expected a JSON object"):
        read_items(find("piqa"), path)
    for limit in (0, -3):
        with pytest.raises(ArgumentError, match="limit: expected at least 1"):
            read_items(find("piqa"), path, limit)


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        ("piqa", '{"question"', "expected a JSON object"),
        ("piqa", [1], "expected a JSON object, found list"),
        ("piqa", {"choices": ["a", "b"], "answer": 0}, "question: expected a text, found keys"),
        ("piqa", {**PLAIN, "question": 3}, "question: expected a text, found int"),
        ("boolq", PLAIN, "passage: expected a text, found keys"),
        ("piqa", {"question": "q", "answer": 0}, "choices: expected a list .*found keys"),
        ("piqa", {**PLAIN, "choices": []}, "choices: expected a list of at least 2 texts, found 0"),
        ("piqa", {**PLAIN, "choices": ["a"]}, "at least 2 texts, found 1"),
        ("piqa", {**PLAIN, "choices": "ab"}, "choices: expected a list"),
        ("piqa", {**PLAIN, "choices": ["a", ""]}, r"choices\[1\]: expected a text that is not"),
        ("piqa", {**PLAIN, "choices": [" ", "a"]}, r"choices\[0\]: expected a text that is not"),
        ("piqa", {**PLAIN, "choices": ["a", None]}, r"choices\[1\]: expected a text .*None"),
        (
            "piqa",
            {**PLAIN, "answer": 2},
            "answer: expected the number of a choice, 0 to 1, found 2",
        ),
        ("piqa", {**PLAIN, "answer": -1}, "found -1"),
        ("piqa", {**PLAIN, "answer": True}, "found True"),
        ("piqa", {**PLAIN, "answer": 0.0}, r"found 0\.0"),
        ("piqa", {**PLAIN, "answer": "B"}, "found 'B'"),
        ("piqa", {"question": "q", "choices": ["a", "b"]}, "answer: .*found None"),
        ("hellaswag", PLAIN, "ctx_a: expected a text"),
        ("hellaswag", {**HELLASWAG, "label": ""}, "label: .*found ''"),  # the test split
        ("hellaswag", {**HELLASWAG, "endings": ["[a]", "b"]}, r"endings\[0\]: expected"),
        ("winogrande", {**WINOGRANDE, "sentence": "no blank"}, "sentence: expected a blank"),
        ("winogrande", {**WINOGRANDE, "sentence": "The _ "}, "with text behind it"),
        ("winogrande", {**WINOGRANDE, "answer": ""}, 'answer: expected "1" or "2"'),
        ("winogrande", {**WINOGRANDE, "option2": None}, "option2: expected a text, found NoneType"),
    ],
)
def test_damage_is_named(tmp_path, task, row, says):
    good = {"hellaswag": HELLASWAG, "winogrande": WINOGRANDE}.get(task, {**PLAIN, "passage": "p"})
    path = write(tmp_path / "a.jsonl", good, row)
    with pytest.raises(FormatError, match=says) as caught:
        read_items(find(task), path)
    assert f"{path}: line 2: " in str(caught.value)


def test_files_without_questions(tmp_path):
    with pytest.raises(FormatError, match="expected at least one question, found none"):
        read_items(find("piqa"), write(tmp_path / "a.jsonl", "", "  "))
    with pytest.raises(MissingFileError, match=r"none\.jsonl: no such file"):
        read_items(find("piqa"), tmp_path / "none.jsonl")


def test_unknown_names_list_the_near_ones():
    with pytest.raises(
        ArgumentError, match="unknown task 'arc_esy'; did you mean arc_easy"
    ) as caught:
        find("arc_esy")
    assert all(name in str(caught.value) for name in TASKS)


def test_where_the_data_is(tmp_path, monkeypatch):
    monkeypatch.setenv("NYBBLE_DATA", str(tmp_path))
    with pytest.raises(MissingFileError, match=r"piqa_valid\.jsonl: no such file"):
        locate(find("piqa"))
    (tmp_path / "qa").mkdir()
    plain = write(tmp_path / "qa" / "piqa_valid.jsonl", PLAIN)
    assert locate(find("piqa")) == plain
    packed = write(tmp_path / "qa" / "piqa_valid.jsonl.gz", PLAIN)
    assert locate(find("piqa")) == packed
    with pytest.raises(ArgumentError, match=r"task hellaswag: .*no file is known for it"):
        locate(find("hellaswag"))
    monkeypatch.delenv("NYBBLE_DATA")
    with pytest.raises(ArgumentError, match=r"task piqa: .*NYBBLE_DATA is not set"):
        locate(find("piqa"))
