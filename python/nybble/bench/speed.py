"""Speed of a model: prompt processing (``pp512``) and text generation (``tg128``).

The tests are the ones other engines print, so that figures can stand in one table:

* ``pp512``: one forward pass over 512 tokens, logits of the last one;
* ``tg128``: 128 forward passes over one token each, logits every time;
* ``@ d1024`` behind a name: with 1024 tokens in the key-value cache already.

The tokens are a fixed pseudo-random trace. Encoding text and choosing tokens are not part of the
time. Each test runs once to warm up (of generation the first tokens) and then ``repeats`` times.

:func:`bandwidth` belongs in the same minute: generating text is a matter of reading the weights
from memory, and on a shared machine its speed moves by a factor of two between minutes.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from nybble.bench import machine
from nybble.errors import ArgumentError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nybble import anatomy
    from nybble.runtime import LanguageModel, Session

#: Megabytes the bandwidth is read over: more than any cache.
BANDWIDTH_MEGABYTES = 256

_TRACE_SEED = 2718281828
_WARM_TOKENS = 16
#: Tokens the core computes together at most.
_BATCH = 512


@dataclass(frozen=True)
class SpeedTest:
    """One test: either a prompt or tokens one at a time, behind ``depth`` others.

    Parameters
    ----------
    prompt
        Tokens computed together.
    gen
        Tokens computed one after the other.
    depth
        Tokens before them.
    """

    prompt: int
    gen: int
    depth: int = 0

    def __post_init__(self) -> None:
        """Refuse tests that measure nothing, or two things at once."""
        if min(self.prompt, self.gen, self.depth) < 0 or (self.prompt > 0) == (self.gen > 0):
            msg = f"test: expected either a prompt or new tokens, found {self}"
            raise ArgumentError(msg)

    @property
    def name(self) -> str:
        """``pp512``, ``tg128``, ``pp512 @ d1024``."""
        what = f"pp{self.prompt}" if self.prompt else f"tg{self.gen}"
        return f"{what} @ d{self.depth}" if self.depth else what

    @property
    def tokens(self) -> int:
        """Tokens that are timed."""
        return self.prompt or self.gen


def bandwidth(threads: int | None = None) -> float:
    """Return the memory's read bandwidth in bytes a second.

    Parameters
    ----------
    threads
        Threads that read; without it as many as a model would use.
    """
    from nybble import _nybble

    if threads is None:
        threads = int(json.loads(_nybble.doctor())["threads_default"])
    return float(_nybble.read_bandwidth(threads, BANDWIDTH_MEGABYTES))


def combinations(
    prompts: Sequence[int], gens: Sequence[int], depths: Sequence[int] = (0,)
) -> list[SpeedTest]:
    """List the tests of all combinations; a length of 0 leaves that kind out."""
    return [
        test
        for depth in depths
        for test in (
            *(SpeedTest(prompt, 0, depth) for prompt in prompts if prompt),
            *(SpeedTest(0, gen, depth) for gen in gens if gen),
        )
    ]


def measure(
    model: "LanguageModel",
    todo: Sequence[SpeedTest],
    *,
    repeats: int = 5,
    on_step: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Run speed tests and return one record each, with the fields bench tools have.

    Parameters
    ----------
    model
        The model.
    todo
        The tests.
    repeats
        How often each is timed.
    on_step
        Called before each run with the test's name, the runs done and the runs in all.

    Raises
    ------
    ArgumentError
        If there is nothing to do, or a test does not fit into the context.
    """
    if not todo or repeats < 1:
        msg = f"bench: expected tests and repeats, found {len(todo)} tests, {repeats} repeats"
        raise ArgumentError(msg)
    for test in todo:
        if test.depth + test.tokens > model.context:
            msg = (
                f"{test.name}: expected at most {model.context} tokens (the model's context), "
                f"found {test.depth + test.tokens}"
            )
            raise ArgumentError(msg)
    trace = _trace(model.vocab_size, max(test.depth + test.tokens for test in todo))
    identity = _identity(model)
    total = len(todo) * (repeats + 1)
    records = []
    for index, test in enumerate(todo):
        session = model.session()
        samples = []
        if test.depth:
            session.raw.forward(trace[: test.depth], "none")
        for run in range(repeats + 1):
            if on_step is not None:
                on_step(test.name, index * (repeats + 1) + run, total)
            warm_up = run == 0
            session.raw.truncate(test.depth)
            nanoseconds = _run(session, test, trace, warm_up=warm_up)
            if not warm_up:
                samples.append(nanoseconds)
        records.append(_record(identity, test, samples))
    if on_step is not None:
        on_step("done", total, total)
    return records


def _trace(vocab: int, length: int) -> "npt.NDArray[np.uint32]":
    """Return the fixed token ids: the same for every model with this vocabulary."""
    import numpy as np

    return np.random.default_rng(_TRACE_SEED).integers(0, vocab, length, dtype=np.uint32)


def _run(
    session: "Session", test: SpeedTest, trace: "npt.NDArray[np.uint32]", *, warm_up: bool
) -> int:
    """Run a test once and return its nanoseconds."""
    forward = session.raw.forward
    if test.prompt:
        tokens = trace[test.depth : test.depth + test.prompt]
        start = time.perf_counter_ns()
        forward(tokens, "last", True)
        return time.perf_counter_ns() - start
    count = min(test.gen, _WARM_TOKENS) if warm_up else test.gen
    steps = [trace[test.depth + i : test.depth + i + 1] for i in range(count)]
    start = time.perf_counter_ns()
    for step in steps:
        forward(step, "last")
    return time.perf_counter_ns() - start


def _identity(model: "LanguageModel") -> dict[str, Any]:
    """Return the fields that are the same for every test of a model."""
    from nybble import __version__, _nybble, anatomy

    checkpoint = _nybble.Checkpoint.open(str(model.path))
    config, plan = json.loads(checkpoint.config()), json.loads(checkpoint.plan())
    parts = anatomy.parts(checkpoint.tensors(), plan)
    info = model.info
    scheme = anatomy.scheme(config, parts)
    return {
        "build": f"nybble {__version__}",
        "cpu_info": machine.cpu_name(),
        "backends": "CPU",
        "isa": json.loads(_nybble.doctor())["best"],
        "kernel": matmul_kernel(list(info["kernels"]), scheme),
        "model_filename": str(model.path),
        "model_type": info["family"],
        "model_size": sum(info["weight_bytes"].values()),
        "model_n_params": info["parameters"],
        "weight_scheme": scheme,
        "n_batch": _BATCH,
        "n_threads": info["threads"],
        "type_k": info["kv_type"],
        "type_v": info["kv_type"],
        "token_policy": info["tokens"],
        "weight_bytes_per_token": _bytes_per_token(info["weight_bytes"], plan, parts),
    }


def _bytes_per_token(
    layouts: Mapping[str, int], plan: Mapping[str, Any], parts: "Sequence[anatomy.Part]"
) -> int:
    """Return the bytes of weights that one token reads: all but the rows of tables it skips."""
    total = sum(layouts.values())
    names = {f"{table['module']}.weight" for table in plan["embeddings"]}
    tables = [part for part in parts if part.name in names]
    if plan["tied"] and tables:
        # The head is the first table, and reads all of it.
        tables.remove(max(tables, key=lambda part: part.weights))
    for part in tables:
        packed = part.layout.startswith("int")
        width = 2 if part.layout in ("F16", "BF16") else 4
        total -= part.size if packed else part.weights * width
    return max(total, 0)


def matmul_kernel(kernels: Sequence[str], scheme: str) -> str:
    """Return the kernel that multiplies most of the weights, ``w4a8/avx2``.

    Parameters
    ----------
    kernels
        The kernel of every operation.
    scheme
        The model's weight scheme; whatever leaves activations in float runs in ``f32``.
    """
    name = scheme.partition(" ")[0].lower()
    operation = name if name in ("w4a8", "w8a8") else "f32"
    return next((kernel for kernel in kernels if kernel.startswith(f"{operation}/")), operation)


def _record(identity: dict[str, Any], test: SpeedTest, samples: list[int]) -> dict[str, Any]:
    speeds = [test.tokens * 1e9 / sample for sample in samples]
    average = statistics.fmean(samples)
    return {
        "test": test.name,
        **identity,
        "n_prompt": test.prompt,
        "n_gen": test.gen,
        "n_depth": test.depth,
        "test_time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(average),
        "stddev_ns": round(statistics.stdev(samples)) if len(samples) > 1 else 0,
        "avg_ts": statistics.fmean(speeds),
        "stddev_ts": statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
        "samples_ns": samples,
        "samples_ts": speeds,
        "ttft_ms": average / 1e6 if test.prompt else None,
        "sparsity": 0.0,
        "draft": None,
        "accepted_per_step": None,
        "peak_rss": machine.peak_rss(),
        "memory_bandwidth": None,
        "bandwidth_share": None,
    }


def add_bandwidth(records: Sequence[dict[str, Any]], bytes_a_second: float) -> None:
    """Write the memory bandwidth into records, and what share of it generating text used."""
    for record in records:
        record["memory_bandwidth"] = bytes_a_second
        if record["n_gen"]:
            used = record["weight_bytes_per_token"] * record["avg_ts"]
            record["bandwidth_share"] = used / bytes_a_second
