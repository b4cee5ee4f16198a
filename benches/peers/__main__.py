"""``python -m benches.peers``: measure, print, write down."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from benches.peers import plot, record, rounds, shapes
from benches.peers.engines import ENGINES, Format

_TRACE_SEED = 2718281828


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benches.peers",
        description="Measure nybble beside other CPU engines: same tokens, threads and minutes.",
    )
    add = parser.add_argument
    names = ", ".join([*shapes.REAL, *shapes.SHAPES])
    add("--model", help=f"{names}, or a Hugging Face folder (default: smollm2)")
    add("--engines", type=_words, metavar="A,B", help=f"of {', '.join(ENGINES)} (default: all)")
    add("--formats", type=_words, metavar="A,B", help="parts of format names, any case")
    add(
        "-t", "--threads", type=_numbers, metavar="N,N", help="thread counts (default: all CPUs, 1)"
    )
    add("-p", "--n-prompt", type=int, metavar="N", help="prompt length; 0 leaves it out (512)")
    add("-n", "--n-gen", type=int, metavar="N", help="new tokens; 0 leaves it out (128)")
    add("-r", "--repeats", type=int, metavar="N", help="rounds (5)")
    add(
        "--quick", action="store_true", help="tiny model, pp16, tg4, one round: a test of this tool"
    )
    work = Path(tempfile.gettempdir()) / "peers-work"
    add("--work", type=Path, default=work, help="folder for models and logs (%(default)s)")
    results = rounds.ROOT / "benches" / "results"
    add("--out", type=Path, help=f"folder for CSV and plot ({results}/<cpu>; quick: in --work)")
    add("--note", default="", help="what the record should say about the circumstances")
    add("--timeout", type=float, default=600, help="seconds an engine has to load or run a test")
    add(
        "--patience",
        type=int,
        default=2,
        metavar="N",
        help="times a turn is taken again while other processes are at work (%(default)s)",
    )
    add(
        "--python",
        action="append",
        default=[],
        metavar="ENGINE=PATH",
        help="interpreter for an engine that is installed elsewhere; repeatable",
    )
    add("--list", action="store_true", help="only tell which engines and formats there are")
    return parser


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; 0 if something was measured, 1 if nothing was, 2 for a wrong option."""
    parser = _parser()
    options = parser.parse_args(arguments)
    from nybble import _nybble
    from nybble.bench import bandwidth, machine

    quick = options.quick
    model = options.model or ("tiny" if quick else "smollm2")
    lengths = [
        (16 if quick else 512) if options.n_prompt is None else options.n_prompt,
        (4 if quick else 128) if options.n_gen is None else options.n_gen,
    ]
    repeats = options.repeats or (1 if quick else 5)
    counts = options.threads or list(dict.fromkeys([machine.cpus(), 1]))
    if min(lengths) < 0 or max(lengths) == 0 or min(counts) < 1 or repeats < 1:
        parser.error("lengths, threads and repeats: expected positive numbers")
    if unknown := set(options.engines or ()) - set(ENGINES):
        parser.error(f"--engines: {', '.join(unknown)}: expected some of {', '.join(ENGINES)}")
    pythons = _pythons(parser, options.python)
    logs = options.work / "logs"
    about = _describe(options.engines or list(ENGINES), logs, pythons)
    if options.list:
        _list(about)
        return 0
    try:
        source = shapes.make(model, options.work)
    except ValueError as error:
        parser.error(str(error))
    name = model if model in shapes.SHAPES or model in shapes.REAL else source.resolve().name
    _say(f"model {name}: {source}")
    ready = _prepare(about, options.formats or [], source, options.work / name, pythons)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tests = _tests(lengths, int(config["vocab_size"]))
    isa = json.loads(_nybble.doctor())["best"]
    common = {
        "model": name,
        "isa": isa,
        "cpu_info": machine.cpu_name(),
        "machine": record.machine_text(),
    }
    out = options.out or (
        options.work / "quick"
        if quick
        else rounds.ROOT / "benches" / "results" / record.cpu_folder(isa)
    )
    file = out / f"{time.strftime('%Y-%m-%d')}.csv"
    picture = file.with_name(f"{file.stem}-{rounds.slug(name)}.png")
    try:
        record.merge(file, [])  # now, not after an hour's work
    except (KeyError, ValueError, OSError) as error:
        parser.error(f"{file}: not a file this tool can add to, move it away: {error!r}")
    rows = []
    for threads in counts:
        arms = [rounds.Arm(*arguments) for arguments in ready]
        _say(f"\n{threads} thread{'s' if threads > 1 else ''}")
        setting = rounds.Setting(
            tests, threads, repeats, logs, options.timeout, options.patience, bandwidth, _say
        )
        stopped = False
        try:
            rounds.run(arms, setting)
        except KeyboardInterrupt:
            stopped = True
            _say("stopped; what there is is written")
        done = rounds.rows(arms, setting, {**common, "note": options.note})
        record.merge(file, done)
        rows += done
        for arm in arms:
            if arm.failure is not None:
                _say(f"no result: {arm.name}, {threads} threads: {arm.failure}")
        if stopped:
            break
    if not rows:
        _say("nothing was measured")
        return 1
    all_rows = [row for row in record.read(file) if row["model"] == name]
    plot.draw(_ordered(all_rows), picture, f"{name} on {_machine(common, isa)}", _foot(all_rows))
    print(record.table(_ordered(rows)))
    print(f"{common['cpu_info']}, {isa}, {common['machine']}")
    print("engines: " + ", ".join(f"{key} {value['version']}" for key, value in about.items()))
    print(f"written: {file} {picture}")
    return 0


def _pythons(parser: argparse.ArgumentParser, pairs: list[str]) -> dict[str, str]:
    found = dict.fromkeys(ENGINES, sys.executable)
    for pair in pairs:
        name, _, path = pair.partition("=")
        if name not in ENGINES or not Path(path).exists():
            parser.error(f"--python: expected ENGINE=PATH, found {pair}")
        found[name] = str(Path(path).absolute())
    return found


def _describe(
    names: list[str], logs: Path, pythons: dict[str, str]
) -> dict[str, dict[str, object]]:
    """Print which engines are there; return those."""
    found = {}
    for name in (name for name in ENGINES if name in names):
        answer = rounds.describe(name, logs, pythons[name])
        if "version" in answer:
            found[name] = answer
        _say(f"{name:18} {answer.get('version') or 'left out: ' + answer['reason']}")
    return found


def _list(about: dict[str, dict[str, object]]) -> None:
    for name in about:
        print(f"\n{name} {about[name]['version']}\n  timed: {ENGINES[name].timed}")
        for form in ENGINES[name].formats:
            print(f"  {form.name:18} {form.about}")


def _prepare(
    about: dict[str, dict[str, object]],
    wanted: list[str],
    source: Path,
    work: Path,
    pythons: dict[str, str],
) -> list[tuple[str, str, Format, Path, str]]:
    """Convert the model for every engine and format; return what an `Arm` is made of."""
    found = []
    for name, engine in about.items():
        for form in ENGINES[name].formats:
            if wanted and not any(part.lower() in form.name.lower() for part in wanted):
                continue
            try:
                path, seconds = rounds.prepare(name, form, source, work, pythons[name], engine)
            except rounds.WorkerError as error:
                _say(f"left out: {name} {form.name}: {error}")
                continue
            if seconds:
                _say(f"prepared {name} {form.name} in {seconds:.0f} s")
            found.append((name, str(engine["version"]), form, path, pythons[name]))
    return found


def _tests(lengths: list[int], vocabulary: int) -> tuple[rounds.Test, ...]:
    """Return the work: the same pseudo-random tokens whoever computes them."""
    import numpy as np

    trace = np.random.default_rng(_TRACE_SEED).integers(0, vocabulary, max(lengths))
    kinds = zip(("prompt", "generate"), lengths, strict=True)
    return tuple(rounds.Test(kind, tuple(trace[:n].tolist())) for kind, n in kinds if n)


def _ordered(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Sort by the registry's order of engines and formats."""
    order = [(name, form.name) for name, engine in ENGINES.items() for form in engine.formats]
    return sorted(rows, key=lambda row: order.index((str(row["engine"]), str(row["format"]))))


def _machine(common: dict[str, str], isa: str) -> str:
    return f"{common['cpu_info']} ({isa})"


def _foot(rows: list[dict[str, object]]) -> str:
    versions = dict.fromkeys(f"{row['engine']} {row['version']}" for row in rows)
    values = [float(str(row["memory_bandwidth_gbs"])) for row in rows]
    others = [float(str(row["others_cpus"])) for row in rows]
    notes = dict.fromkeys(str(row["note"]) for row in rows if row["note"])
    return (
        f"{', '.join(versions)}\n{rows[0]['machine']}; memory read at {min(values):.0f} to "
        f"{max(values):.0f} GB/s, "
        f"other processes used {min(others):.1f} to {max(others):.1f} CPUs\n{' | '.join(notes)}"
    )


if __name__ == "__main__":
    sys.exit(main())
