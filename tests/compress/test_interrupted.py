"""A compression killed at any moment leaves its final name as it was: absent, or a whole model."""

import json
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import nybble

KILLS = 50
NAMES = 4

# Imports once and forks for each try, so that fifty tries cost fifty compressions and not fifty
# starts of Python. The process that forks never has a second thread.
SERVER = textwrap.dedent(
    """
    import json, os, signal, sys, time
    import nybble.compress.pipeline
    from nybble.compress import compress

    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                compress(order["source"], order["out"], weights=order["weights"],
                         overwrite=True, threads=2, progress=False)
                code = 0
            except BaseException as error:
                print(error, file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        began = time.monotonic()
        if order["after"] is not None:
            time.sleep(order["after"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        answer = {"killed": os.WIFSIGNALED(status), "code": os.waitstatus_to_exitcode(status),
                  "seconds": time.monotonic() - began}
        print(json.dumps(answer), flush=True)
    """
)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.timeout(600)
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs fork and SIGKILL")
def test_kills_at_random_moments(tiny_folder, tmp_path):
    draw = random.Random(0)
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def attempt(out: Path, after: float | None, weights: int) -> dict:
            order = {"source": str(tiny_folder), "out": str(out), "after": after}
            server.stdin.write(json.dumps({**order, "weights": weights}) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        probe = [attempt(tmp_path / "probe", None, 4) for _ in range(3)]
        assert [answer["code"] for answer in probe] == [0, 0, 0]
        usual = max(answer["seconds"] for answer in probe)
        ids = [1, 2, 3]
        whole = {}
        for bits in (4, 8):
            assert attempt(tmp_path / f"whole{bits}", None, bits)["code"] == 0
            model = nybble.load(tmp_path / f"whole{bits}", threads=1)
            whole[bits] = model.forward(ids).tobytes()
        assert whole[4] != whole[8]

        kills = tries = absent = present = staged = 0
        states: dict[str, bytes | None] = {}
        while kills < KILLS:
            tries += 1
            assert tries < 20 * KILLS
            name, bits = f"out{tries % NAMES}", draw.choice((4, 8))
            answer = attempt(tmp_path / name, draw.uniform(0, 1.1 * usual), bits)
            assert answer["killed"] or answer["code"] == 0
            kills += answer["killed"]
            before = states.get(name)
            if (tmp_path / name).exists():
                present += 1
                state = nybble.load(tmp_path / name, threads=1).forward(ids).tobytes()
                assert state in (before, whole[bits])  # the old model or the new, nothing between
            else:
                absent += 1
                state = None
                assert before is None  # a model that was there is never lost
            if not answer["killed"]:
                assert state == whole[bits]
            states[name] = state
            staged += bool(hidden(tmp_path))
            if state is not None and draw.random() < 0.4:
                shutil.rmtree(tmp_path / name)
                states[name] = None
        # The moments were really spread: some kills came before anything was there, some while the
        # hidden folder was being filled.
        assert absent
        assert present
        assert staged

        # What the dead left beside a name is removed by the next run under that name.
        for number in range(NAMES):
            assert attempt(tmp_path / f"out{number}", None, 4)["code"] == 0
            loaded = nybble.load(tmp_path / f"out{number}", threads=1)
            assert loaded.forward(ids).tobytes() == whole[4]
        assert hidden(tmp_path) == []
        server.stdin.close()
        assert server.wait() == 0
