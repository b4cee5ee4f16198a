"""``nybble chat`` through a pipe and through a terminal."""

import io
import json
import os
import select
import signal
import sys
import time

import pytest


@pytest.fixture
def talk(run, tiny_folder, monkeypatch):
    """Hold a conversation through a pipe."""

    def call(*lines, options=()):
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return run("chat", tiny_folder, "-n", 8, "--temperature", 0, *options)

    return call


def messages(outcome):
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_answers_to_lines_of_a_pipe(talk, tiny):
    outcome = talk("hello", "how are you")
    assert outcome.code == 0, outcome.err
    history = [{"role": "user", "content": "hello"}]
    first = tiny.chat(history, 8, top_p=0.9, repeat_penalty=1.1).text
    history += [{"role": "assistant", "content": first}, {"role": "user", "content": "how are you"}]
    second = tiny.chat(history, 8, top_p=0.9, repeat_penalty=1.1).text
    expected = "".join(text if text.endswith("\n") else text + "\n" for text in (first, second))
    assert outcome.out == expected
    assert outcome.err.count("new at") == 2


def test_the_cache_is_kept_between_answers(talk):
    value = messages(talk("hello", "how are you", options=["--json"]))
    first, second = value["answers"]
    assert second["prompt_tokens"] > first["prompt_tokens"]
    # Everything up to the end of the first answer is known (but its last token, perhaps).
    computed = second["metrics"]["prefill_tokens"]
    assert computed < second["prompt_tokens"] - first["prompt_tokens"] + 2


def test_json_is_the_conversation(talk):
    value = messages(talk("one", "", "two", options=["--json", "--system", "be brief"]))
    assert [message["role"] for message in value["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert [m["content"] for m in value["messages"] if m["role"] == "user"] == ["one", "two"]
    assert len(value["answers"]) == 2


def test_commands(talk):
    value = messages(talk("one", "/reset", "two", "/exit", "three", options=["--json"]))
    assert [m["content"] for m in value["messages"] if m["role"] == "user"] == ["two"]
    outcome = talk("/help", "/nonsense", "/exit")
    assert outcome.out == ""
    assert "/reset" in outcome.err
    assert "/nonsense is not a command" in outcome.err
    value = messages(talk("//slash", options=["--json"]))
    assert value["messages"][0]["content"] == "/slash"


def test_reset_forgets(talk):
    value = messages(talk("one", "/reset", "one", options=["--json"]))
    first, second = value["answers"]
    assert first["tokens"] == second["tokens"]
    assert first["prompt_tokens"] == second["prompt_tokens"]


def test_a_full_context_is_said_and_the_talk_goes_on(talk):
    long = "hello " * 60
    outcome = talk(long, "/reset", "hi", options=["--context", 64])
    assert outcome.code == 0
    assert "does not fit into the context of 64 tokens any more: /reset" in outcome.err
    assert outcome.err.count("new at") == 1


def test_an_answer_that_fills_the_context(talk):
    prompt = messages(talk("hi", options=["--json"]))["answers"][0]["prompt_tokens"]
    outcome = talk("hi", options=["--context", prompt + 3])
    assert "the answer does not fit into the context" in outcome.err


def test_a_model_without_a_template(run, tiny_folder, tmp_path, monkeypatch):
    for file in tiny_folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    outcome = run("chat", tmp_path)
    assert outcome.code == 1
    assert "has no chat template" in outcome.err


def test_no_input_at_all(talk):
    assert talk().code == 0


@pytest.mark.timeout(120)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs pseudo-terminals")
def test_a_terminal(tiny_folder):
    """Prompt, answer, Ctrl-C at the prompt, Ctrl-C in an answer, Ctrl-D."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        # A background job of a shell inherits "ignore"; a person's terminal does not.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        arguments = ["-m", "nybble", "chat", str(tiny_folder), "--temperature", "5", "-n", "400"]
        os.execv(sys.executable, [sys.executable, *arguments])
    seen = ""

    def read():
        try:
            return os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # the other side has closed
            return pytest.fail(f"it ended: {seen}")

    def wait_for(text, send=b""):
        """Read until `text` appears; keep sending, since a key can come before it is waited for."""
        nonlocal seen
        for _ in range(60):
            if text in seen:
                break
            os.write(terminal, send)
            while select.select([terminal], [], [], 1.0)[0] and text not in seen:
                seen += read()
        assert text in seen, seen
        seen = seen.partition(text)[2]

    try:
        wait_for("> ")
        wait_for("(Ctrl-D or /exit leaves)", send=b"\x03")
        wait_for("> ")
        os.write(terminal, b"hello\n")
        wait_for("hello\r\n")
        os.write(terminal, b"\x03")
        # Stopped, unless the model had ended its answer just before.
        wait_for("> ")
        os.write(terminal, b"/help\n")
        wait_for("/reset")
        wait_for("> ")
        os.write(terminal, b"\x04")
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                if not os.read(terminal, 4096):
                    break
            except OSError:
                break
        _, status = os.waitpid(pid, 0)
        pid = None
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)
