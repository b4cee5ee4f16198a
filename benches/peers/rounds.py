"""Start the workers, take turns, keep the times."""

from __future__ import annotations

import json
import os
import select
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benches.peers.engines import ENGINES, Format

ROOT = Path(__file__).resolve().parents[2]
#: Of the machine's memory, what waiting workers may hold; above it they end after their turn.
_RESIDENT_SHARE = 0.5
_WARM_TOKENS = 16
#: CPUs that others may use during a turn that counts as quiet.
_QUIET = 0.15


class WorkerError(Exception):
    """A worker died, gave no answer in time, or answered with a reason."""


@dataclass(frozen=True)
class Test:
    """Tokens computed together (``prompt``) or one after the other (``generate``)."""

    kind: str
    ids: tuple[int, ...]

    @property
    def name(self) -> str:
        """``pp512``, ``tg128``."""
        return f"{'pp' if self.kind == 'prompt' else 'tg'}{len(self.ids)}"


class Worker:
    """A process that answers JSON lines, such as `benches.peers.worker`.

    Parameters
    ----------
    arguments
        Its task.
    log
        File for what it and its libraries print.
    python
        Interpreter with the engine installed.
    threads
        What thread pools are told that listen to the environment alone.
    module
        What is run.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        python: str,
        threads: int,
        module: str = "benches.peers.worker",
    ) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        count = str(threads)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = {
            **os.environ,
            **dict.fromkeys(names, count),
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "HF_HUB_OFFLINE": "1",  # all models are local; a lookup would only wait
            "TOKENIZERS_PARALLELISM": "false",
        }
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [python, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=environment,
                cwd=ROOT,
            )

    def ask(self, question: object, timeout: float) -> dict[str, Any]:
        """Send a line and wait for the answer."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(question).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words()) from None
        return self.answer(timeout)

    def answer(self, timeout: float) -> dict[str, Any]:
        """Wait for a line.

        Raises
        ------
        WorkerError
            If there is none in time.
        """
        stdout = self._process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], timeout)
        if not ready:
            self.close()
            message = f"no answer in {timeout:.0f} s; {self._log}"
            raise WorkerError(message)
        line = stdout.readline()
        if not line:
            self._process.wait()
            raise WorkerError(self._last_words())
        value: dict[str, Any] = json.loads(line)
        if "reason" in value:
            self.close()
            raise WorkerError(value["reason"])
        return value

    def resident(self) -> int:
        """Return the bytes it holds now, 0 where the system does not say."""
        try:
            pages = Path(f"/proc/{self._process.pid}/statm").read_text(encoding="ascii").split()[1]
        except OSError:
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def cpu_seconds(self) -> float:
        """Return the CPU time it has used."""
        try:
            text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii")
        except OSError:
            return 0.0
        # The name in brackets may hold spaces; user and system time are fields 14 and 15.
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _last_words(self) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace").strip()
        last = text.splitlines()[-1] if text else "it printed nothing"
        return f"ended with status {self._process.returncode}: {last:.300} ({self._log})"


@dataclass
class Arm:
    """An engine with one format of the model, and what was measured of it."""

    engine: str
    version: str
    form: Format
    model: Path
    python: str
    worker: Worker | None = None
    weight_bytes: int = 0
    peak_rss: int = 0
    failure: str | None = None
    nanoseconds: dict[str, list[int]] = field(default_factory=dict)
    bandwidth: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Engine and format."""
        return f"{self.engine} {self.form.name}"


@dataclass(frozen=True)
class Setting:
    """What is the same for every engine.

    Parameters
    ----------
    tests
        The work.
    threads
        Of every engine.
    repeats
        Rounds.
    logs
        Folder for the workers' logs.
    timeout
        Seconds a worker has for loading, or for a test.
    patience
        How often a turn is taken again when other processes were at work during it. The quietest
        one counts, which is not the same as the fastest one.
    bandwidth
        Reads the memory's bandwidth in bytes a second with so many threads.
    say
        Takes a line for the user.
    """

    tests: tuple[Test, ...]
    threads: int
    repeats: int
    logs: Path
    timeout: float
    patience: int
    bandwidth: Callable[[int], float]
    say: Callable[[str], None]


def slug(text: str) -> str:
    """Return the text as part of a file's name."""
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in text.lower()).split())


def describe(name: str, logs: Path, python: str) -> dict[str, Any]:
    """Ask an engine for its version, or the ``reason`` why it has none."""
    worker = Worker(["describe", name], logs / f"{slug(name)}.log", python, 1)
    try:
        return worker.answer(120)
    except WorkerError as error:
        return {"reason": str(error)}
    finally:
        worker.close()


def prepare(
    name: str, form: Format, source: Path, work: Path, python: str, about: Mapping[str, Any]
) -> tuple[Path, float]:
    """Return the folder the engine opens and the seconds it took to make, 0 if it was there."""
    if form.name not in about["converted"]:
        return source, 0.0
    target = work / slug(name) / slug(form.name)
    marker = target / "prepared.json"
    key = {"fingerprint": about["fingerprint"], "source": str(source.resolve())}
    if marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == key:
        return target, 0.0
    partial = target.with_name(f"{target.name}.partial")
    for old in (partial, target):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    arguments = ["prepare", name, form.name, str(source.resolve()), str(partial.resolve())]
    log = work / "logs" / f"prepare-{slug(name)}-{slug(form.name)}.log"
    worker = Worker(arguments, log, python, os.cpu_count() or 1)
    try:
        seconds = float(worker.answer(3600)["seconds"])
    finally:
        worker.close()
    (partial / marker.name).write_text(json.dumps(key), encoding="utf-8")
    partial.rename(target)
    return target, seconds


def run(arms: Sequence[Arm], setting: Setting) -> None:
    """Measure all arms: every one has its turn in a round before the next round starts.

    Every second round goes backwards, so that nobody always follows the same neighbour. An arm that
    fails keeps the reason and has no more turns.
    """
    budget = _RESIDENT_SHARE * _memory()
    try:
        for index in range(setting.repeats):
            for arm in arms[:: 1 if index % 2 == 0 else -1]:
                if arm.failure is not None:
                    continue
                try:
                    line = _turn(arm, setting)
                except WorkerError as error:
                    arm.failure = str(error)
                    line = f"failed: {error}"
                setting.say(f"  round {index + 1}/{setting.repeats}  {arm.name:32}  {line}")
                _keep_within(budget, arm, arms)
    finally:
        for arm in arms:
            if arm.worker is not None:
                arm.worker.close()
                arm.worker = None


def _turn(arm: Arm, setting: Setting) -> str:
    if arm.worker is None:
        _start(arm, setting)
    tries = []
    for _ in range(1 + setting.patience):
        tries.append(_try(arm, setting))
        if tries[-1].others <= _QUIET:
            break
    best = min(tries, key=lambda one: one.others)
    arm.bandwidth.append(best.bandwidth)
    arm.others.append(best.others)
    shown = []
    for test in setting.tests:
        arm.nanoseconds.setdefault(test.name, []).append(best.nanoseconds[test.name])
        shown.append(f"{test.name} {len(test.ids) * 1e9 / best.nanoseconds[test.name]:8.1f} tok/s")
    return (
        f"{'  '.join(shown)}  memory {best.bandwidth / 1e9:.1f} GB/s, others {best.others:.2f} CPUs"
    )


@dataclass(frozen=True)
class _Try:
    nanoseconds: dict[str, int]
    bandwidth: float
    others: float


def _try(arm: Arm, setting: Setting) -> _Try:
    assert arm.worker is not None
    bandwidth = setting.bandwidth(setting.threads)
    start, busy, own = time.perf_counter(), _busy_seconds(), arm.worker.cpu_seconds()
    times = {}
    for test in setting.tests:
        answer = arm.worker.ask({"kind": test.kind, "ids": test.ids}, setting.timeout)
        times[test.name] = answer["nanoseconds"]
        arm.peak_rss = max(arm.peak_rss, answer["peak_rss"])
    others = (_busy_seconds() - busy) - (arm.worker.cpu_seconds() - own)
    return _Try(times, bandwidth, max(0.0, others / (time.perf_counter() - start)))


def _busy_seconds() -> float:
    """Return the CPU time that everyone together has used, 0 where the system does not say.

    Time stolen by the machine's host counts as used.
    """
    try:
        text = Path("/proc/stat").read_text(encoding="ascii")
    except OSError:
        return 0.0
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, text.split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _start(arm: Arm, setting: Setting) -> None:
    """Load the model and run every test once, of generation the first tokens, untimed."""
    context = max(len(test.ids) for test in setting.tests)
    arguments = ["serve", arm.engine, arm.form.name, str(arm.model.resolve())]
    arguments += [str(setting.threads), str(context)]
    log = setting.logs / f"{slug(arm.name)}-{setting.threads}t.log"
    arm.worker = Worker(arguments, log, arm.python, setting.threads)
    arm.weight_bytes = arm.worker.answer(setting.timeout)["weight_bytes"]
    for test in setting.tests:
        ids = test.ids if test.kind == "prompt" else test.ids[:_WARM_TOKENS]
        arm.worker.ask({"kind": test.kind, "ids": ids}, setting.timeout)


def _keep_within(budget: float, latest: Arm, arms: Sequence[Arm]) -> None:
    """End the latest worker if all waiting ones together hold too much; it starts anew next round.

    Waiting workers read nothing and sleep, so all that they take is memory.
    """
    if latest.worker is None:
        return
    held = sum(arm.worker.resident() for arm in arms if arm.worker is not None)
    if latest.failure is not None or held > budget:
        latest.worker.close()
        latest.worker = None


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def rows(arms: Sequence[Arm], setting: Setting, common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one record for every arm and test that has times."""
    found = []
    for arm in arms:
        for test in setting.tests:
            samples = arm.nanoseconds.get(test.name, [])
            # An arm that failed half-way has times of other minutes than the rest.
            if arm.failure is not None or not samples:
                continue
            speeds = [len(test.ids) * 1e9 / sample for sample in samples]
            prompt = test.kind == "prompt"
            found.append(
                {
                    "engine": arm.engine,
                    "version": arm.version,
                    "model": common["model"],
                    "format": arm.form.name,
                    "weight_bits": arm.form.bits,
                    "weight_bytes": arm.weight_bytes,
                    "test": test.name,
                    "n_prompt": len(test.ids) if prompt else 0,
                    "n_gen": 0 if prompt else len(test.ids),
                    "n_threads": setting.threads,
                    "median_ts": statistics.median(speeds),
                    "avg_ts": statistics.fmean(speeds),
                    "stddev_ts": statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
                    "samples_ts": speeds,
                    "peak_rss": arm.peak_rss,
                    "memory_bandwidth_gbs": statistics.median(arm.bandwidth) / 1e9,
                    "memory_bandwidth_samples_gbs": [value / 1e9 for value in arm.bandwidth],
                    "others_cpus": statistics.median(arm.others),
                    "timed": ENGINES[arm.engine].timed,
                    "isa": common["isa"],
                    "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "cpu_info": common["cpu_info"],
                    "machine": common["machine"],
                    "note": common["note"],
                }
            )
    return found
