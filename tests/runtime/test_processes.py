"""Threads, forked children, Ctrl-C, panics: what happens around a computation."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import nybble
from nybble.errors import NybbleError
from tiny import write_llama

IDS = [5, 6, 7, 8]


def test_two_threads_with_two_models(tiny_folder, tmp_path):
    other_folder = write_llama(tmp_path / "other", seed=1)
    models = [nybble.load(folder, threads=2) for folder in (tiny_folder, other_folder)]
    expected = [model.generate(IDS, 40, ignore_end=True).tokens for model in models]
    results = [None, None]

    def work(i):
        results[i] = [models[i].generate(IDS, 40, ignore_end=True).tokens for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [[tokens] * 5 for tokens in expected]


def test_many_threads_with_one_model(tiny):
    expected = tiny.generate(IDS, 20, ignore_end=True).tokens
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(tiny.generate(IDS, 20, ignore_end=True).tokens)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [expected] * 4


def test_threads_do_not_change_the_result(tiny_folder):
    expected = nybble.load(tiny_folder, threads=1).forward(IDS * 20)
    for threads in (2, 3):
        assert np.array_equal(nybble.load(tiny_folder, threads=threads).forward(IDS * 20), expected)


def test_other_python_threads_run_meanwhile(tmp_path):
    folder = write_llama(tmp_path / "big", hidden=256, inner=1024, layers=6, heads=8, context=2048)
    model = nybble.load(folder, threads=1)
    ticks = []
    done = threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.002)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.monotonic()
    model.session().forward([5] * 1500)
    end = time.monotonic()
    done.set()
    ticker.join()
    during = [t for t in ticks if start < t < end]
    assert len(during) > 3


def test_a_session_used_by_two_threads(tmp_path):
    folder = write_llama(tmp_path / "big", hidden=256, inner=1024, layers=6, heads=8, context=2048)
    session = nybble.load(folder, threads=1).session()
    problems = []

    def work():
        try:
            session.forward([5] * 800)
        except NybbleError as error:
            problems.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(session) == 800 * (2 - len(problems))
    assert all("one thread at a time" in problem for problem in problems)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_goes_on(tiny):
    expected = tiny.generate(IDS, 20, ignore_end=True).tokens  # the pool's threads run now
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(80)
            same = tiny.generate(IDS, 20, ignore_end=True).tokens == expected
            fresh = nybble.load(tiny.path, threads=2)
            same = same and fresh.generate(IDS, 20, ignore_end=True).tokens == expected
            del fresh
            text = tiny.generate("the cat", 5, ignore_end=True).text
            os.write(write, b"same" if same and text else b"different")
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    answer = os.read(read, 100)
    os.close(read)
    _, status = os.waitpid(child, 0)
    assert (status, answer) == (0, b"same")
    assert tiny.generate(IDS, 20, ignore_end=True).tokens == expected


INTERRUPTED = """
import os, signal, sys, threading, time
import nybble

# A background job of a shell inherits "ignore"; a person's terminal does not.
signal.signal(signal.SIGINT, signal.default_int_handler)
model = nybble.load(sys.argv[1], threads=2)
session = model.session()
session.forward([5] * 16)
kind = sys.argv[2]
sent = []

def interrupt():
    time.sleep(0.5)
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    if kind == "prefill":
        while True:
            session.forward([5] * 6000)
            session.truncate(16)
    elif kind == "generate":
        while True:
            model.generate([5] * 6000, 8, ignore_end=True)
    else:
        for _ in model.stream([5] * 4, 8000, ignore_end=True):
            pass
        while True:
            pass
except KeyboardInterrupt:
    print("late", time.monotonic() - sent[0])
print("kept", len(session))
print("works", model.forward([5, 6]).shape)
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["prefill", "generate", "stream"])
def test_ctrl_c_stops_at_once(tmp_path, kind):
    folder = write_llama(
        tmp_path / "long", hidden=256, inner=1024, layers=8, heads=8, context=8192, vocab=290
    )
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(folder), kind],
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    lines = dict(line.split(" ", 1) for line in run.stdout.splitlines())
    assert float(lines["late"]) < 1.0
    # An interrupted call leaves the cache as it was before (or as a whole call left it).
    assert int(lines["kept"]) in {16, 6016}
    assert lines["works"] == "(2, 290)"


def forward_for_ever(model):
    while True:
        model.session().forward([5] * 4000)


def test_a_handler_that_raises_something_else(tmp_path):
    folder = write_llama(tmp_path / "long", hidden=256, inner=1024, layers=8, heads=8, context=8192)
    model = nybble.load(folder, threads=1)

    class TooLateError(Exception):
        pass

    def handler(*_):
        raise TooLateError

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(TooLateError):
            forward_for_ever(model)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def default_threads(prepare) -> int:
    """The threads of a model in a new process, in which `prepare` is called first."""
    code = (
        "import json; from nybble import _nybble; "
        "print(json.loads(_nybble.doctor())['threads_default'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "NYBBLE_THREADS"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, preexec_fn=prepare, env=environment, capture_output=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks"
)
def test_the_affinity_mask_is_the_number_of_threads():
    allowed = sorted(os.sched_getaffinity(0))
    assert default_threads(lambda: os.sched_setaffinity(0, allowed[:1])) == 1
    assert default_threads(lambda: None) <= len(allowed)


@contextmanager
def cgroup_of_one_cpu() -> Iterator[Path]:
    """A cgroup, of version 1 or 2, that may use one CPU's time; to make one takes a root."""
    groups = Path("/sys/fs/cgroup")
    first = groups / "cpu"
    group = (first if first.is_dir() else groups) / f"nybble-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"a cgroup cannot be made here: {error}")
    try:
        try:
            if first.is_dir():
                period = (group / "cpu.cfs_period_us").read_text()
                (group / "cpu.cfs_quota_us").write_text(period)
            else:
                (group / "cpu.max").write_text("100000 100000")
        except OSError as error:
            pytest.skip(f"a cgroup here takes no quota: {error}")
        yield group
    finally:
        group.rmdir()


def test_the_quota_of_a_cgroup_is_the_number_of_threads():
    with cgroup_of_one_cpu() as group:
        members = group / "cgroup.procs"
        assert default_threads(lambda: members.write_text(str(os.getpid()))) == 1
