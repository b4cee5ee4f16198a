"""The process that runs one engine: ``python -m benches.peers.worker TASK ENGINE ...``.

Tasks: ``describe`` tells what the engine is, ``prepare`` converts a model for it, ``serve`` loads
one and then runs a test for every line on its input. A crash, a leak or a library's threads end
with this process, and its peak memory is the engine's own.

Answers are JSON lines on the original standard output. Libraries print as well, from C too; so
descriptor 1 is pointed at the log (standard error) before anything else is loaded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

_STATUS = Path("/proc/self/status")


def peak_rss() -> int:
    """Return the most memory this process ever held, in bytes.

    Linux counts for the process itself in ``VmHWM``; what `getrusage` says includes the memory of
    the parent at the time of the fork.
    """
    try:
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(name: str) -> dict[str, Any]:
    """Return the engine's version, or the reason why there is none."""
    from benches.peers.engines import ENGINES, Unavailable

    engine = ENGINES[name]()
    try:
        version, fingerprint = engine.available(), engine.fingerprint()
    except Unavailable as reason:
        return {"reason": str(reason)}
    return {
        "version": version,
        "fingerprint": fingerprint,
        "converted": [form.name for form in engine.formats if engine.needs_conversion(form.name)],
    }


def prepare(name: str, form: str, source: str, target: str) -> dict[str, Any]:
    """Convert a model; the folder `target` exists and is empty."""
    from benches.peers.engines import ENGINES, Unavailable

    start = time.perf_counter()
    try:
        ENGINES[name]().prepare(Path(source), form, Path(target))
    except Unavailable as reason:
        return {"reason": str(reason)}
    return {"seconds": time.perf_counter() - start}


def serve(
    answer: Callable[[Any], None], name: str, form: str, model: str, threads: str, context: str
) -> None:
    """Load a model, then time ``{"kind": "prompt" or "generate", "ids": [...]}`` line by line."""
    from benches.peers.engines import ENGINES

    session = ENGINES[name]().open(Path(model), form, int(threads), int(context))
    answer({"weight_bytes": session.weight_bytes})
    for line in sys.stdin:
        task = json.loads(line)
        run = session.prompt if task["kind"] == "prompt" else session.generate
        session.reset()
        start = time.perf_counter_ns()
        run(task["ids"])
        answer({"nanoseconds": time.perf_counter_ns() - start, "peak_rss": peak_rss()})


def main(arguments: list[str]) -> int:
    """Run a task; an exception ends up in the log."""
    answers = _take_output()

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    task, *rest = arguments
    if task == "describe":
        answer(describe(*rest))
    elif task == "prepare":
        answer(prepare(*rest))
    else:
        serve(answer, *rest)
    answers.flush()
    # Some libraries crash in their destructors, after the work is done.
    sys.stderr.flush()
    os._exit(0)


def _take_output() -> TextIO:
    """Keep standard output for answers and send what anything else prints to the log."""
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
