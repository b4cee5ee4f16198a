"""The frame of the command line: exit codes, messages, pipes and Ctrl-C."""

import signal
import subprocess
import sys
import time

import pytest

from nybble.cli import doctor
from nybble.cli.app import app, main


def one_line(text):
    lines = text.splitlines()
    assert len(lines) == 1, text
    return lines[0]


def test_version(run):
    import nybble

    assert run("--version") == (0, f"nybble {nybble.__version__}\n", "")


def test_every_verb_has_help(run):
    verbs = [command.name for command in app.registered_commands]
    assert {"compress", "run", "chat", "pull", "demo", "doctor", "inspect", "eval", "bench"} <= {
        *verbs
    }
    listed = run("--help").out
    for verb in verbs:
        outcome = run(verb, "-h")
        assert outcome.code == 0
        assert "Usage: nybble " + verb in outcome.out
        assert f" {verb} " in listed


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["run"],
        ["run", "model"],
        ["run", "model", "-p"],
        ["run", "model", "-p", "x", "--wrong"],
        ["run", "model", "-p", "x", "-n", "-1"],
        ["run", "model", "-p", "x", "-n", "many"],
        ["run", "model", "-p", "x", "--temperature", "nan"],
        ["run", "model", "-p", "x", "--temperature", "inf"],
        ["run", "model", "-p", "x", "--temperature", "-1"],
        ["run", "model", "-p", "x", "--top-p", "1.5"],
        ["run", "model", "-p", "x", "--min-p", "nan"],
        ["run", "model", "-p", "x", "--repeat-penalty", "0"],
        ["run", "model", "-p", "x", "--top-k", "-3"],
        ["run", "model", "-p", "x", "--seed", "-3"],
        ["run", "model", "-p", "x", "--seed", str(1 << 64)],
        ["run", "model", "-p", "x", "-t", "0"],
        ["run", "model", "-p", "x", "--context", "0"],
        ["run", "model", "-p", "x", "--system", "without chat"],
        ["run", "model", "-p", "x", "--stop", ""],
        ["chat"],
        ["chat", "model", "-n", "0"],
        ["compress", "model"],
        ["compress", "model", "--out", "x", "--weights", "5"],
        ["compress", "model", "--out", "x", "--activations", "5"],
        ["compress", "model", "--out", "x", "--group", "33"],
        ["eval", "model"],
        ["eval", "model", "--text", "x", "--context", "1"],
        ["eval", "model", "--text", "x", "--max-tokens", "1"],
        ["bench", "model", "-p", "1,,2"],
        ["bench", "model", "-p", "-1"],
        ["bench", "model", "-p", "0", "-n", "0"],
        ["bench", "model", "-r", "0"],
        ["bench", "model", "-o", "xml"],
        ["bench", "model", "-o", "csv", "--json"],
        ["pull"],
        ["pull", "x", "--source", "elsewhere"],
        ["inspect"],
        ["doctor", "extra"],
    ],
)
def test_a_wrong_command_line_is_2(run, arguments):
    outcome = run(*arguments)
    assert outcome.code == 2
    said = outcome.err + outcome.out
    assert "Usage: nybble" in said or "Error" in said
    assert "Traceback" not in outcome.err


VERBS_WITH_MODEL = [
    ["run", "MODEL", "-p", "x"],
    ["chat", "MODEL"],
    ["inspect", "MODEL"],
    ["bench", "MODEL"],
    ["compress", "MODEL", "--out", "OUT"],
]


@pytest.mark.parametrize("arguments", VERBS_WITH_MODEL)
def test_a_model_that_is_not_there_is_1_and_one_line(run, tmp_path, arguments):
    filled = [
        {"MODEL": "nowhere/at-all", "OUT": str(tmp_path / "out")}.get(a, a) for a in arguments
    ]
    outcome = run(*filled)
    assert (outcome.code, outcome.out) == (1, "")
    said = one_line(outcome.err)
    assert said.startswith("error: nowhere/at-all: no such file or folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", VERBS_WITH_MODEL)
def test_a_file_that_is_no_model_is_1_and_named(run, tmp_path, arguments):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"\x80\x02}q\x00." * 10)
    filled = [{"MODEL": str(file), "OUT": str(tmp_path / "out")}.get(a, a) for a in arguments]
    outcome = run(*filled)
    assert (outcome.code, outcome.out) == (1, "")
    assert "weights.bin" in one_line(outcome.err)
    assert list(tmp_path.iterdir()) == [file]


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("NYBBLE_DEBUG", "1")
    outcome = run("inspect", "/nowhere")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: /nowhere")


def test_names_cannot_steer_the_terminal(run, tmp_path):
    outcome = run("inspect", tmp_path / "a\x1b[31m\nb")
    assert outcome.code == 1
    assert "\x1b" not in one_line(outcome.err)


def test_a_defect_says_that_it_is_one(run, monkeypatch):
    def broken():
        return 1 // 0

    monkeypatch.setattr(doctor, "examine", broken)
    outcome = run("doctor")
    assert outcome.code == 1
    assert one_line(outcome.err).startswith("error: ZeroDivisionError: ")
    assert "a defect of nybble" in outcome.err


def test_errors_of_the_system_name_the_file(run, monkeypatch):
    def broken():
        raise PermissionError(13, "Permission denied", "/root/secret")

    monkeypatch.setattr(doctor, "examine", broken)
    assert one_line(run("doctor").err) == "error: /root/secret: Permission denied"


def test_help_and_version_load_little():
    program = (
        "import sys\n"
        "from nybble.cli.app import main\n"
        "code = main(['run', '--help']) + main(['--version'])\n"
        "heavy = {'numpy', 'tokenizers', 'torch', 'transformers', 'jinja2', 'huggingface_hub'}\n"
        "loaded = heavy & set(sys.modules)\n"
        "print(loaded, file=sys.stderr)\n"
        "sys.exit(code or bool(loaded))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_ctrl_c_in_a_verb_is_130(run, monkeypatch):
    def broken():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", broken)
    outcome = run("doctor")
    assert (outcome.code, outcome.err) == (130, "")


def test_ctrl_c_stops_a_generation_at_once(start, tiny_folder):
    process = start("run", tiny_folder, "-p", "hello", "-n", "400", "--temperature", "1")
    assert process.stdout.read(1)  # it writes
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = process.communicate(timeout=80)
    # The tiny model may have ended by itself in the meantime.
    assert process.returncode in (130, 0)
    assert time.monotonic() - began < 20
    assert b"Traceback" not in err


def test_a_reader_that_goes_away_is_no_error(start, tiny_folder):
    process = start("run", tiny_folder, "-p", "hello", "-n", "400", "-q")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(80) == 141
    assert err == b""


def test_a_terminal_without_unicode(start, tiny_folder):
    process = start("bench", tiny_folder, "-p", "4", "-n", "0", "-r", "1", PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=80)
    assert process.returncode == 0, err
    assert b"pp4" in out


def test_main_without_arguments_reads_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nybble", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("nybble ")
