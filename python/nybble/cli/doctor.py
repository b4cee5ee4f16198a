"""``nybble doctor``: what this machine offers and what nybble makes of it."""

import json
import os
import platform
from typing import Any

from nybble.cli import options

#: The environment variables nybble reads.
_VARIABLES = (
    "NYBBLE_CACHE",
    "NYBBLE_DEBUG",
    "NYBBLE_ISA",
    "NYBBLE_OFFLINE",
    "NYBBLE_THREADS",
    "HF_HUB_OFFLINE",
)


def doctor(as_json: options.Json = False) -> None:
    """Show instruction sets, the kernel chosen for each operation, threads and memory bandwidth.

    Says what keeps nybble from running as fast as it could. It takes a second or two, because the
    memory is measured.
    """
    from nybble.cli import output

    found = examine()
    if as_json:
        output.emit_json(found)
        return
    tiers = output.grid("Instruction sets", ("tier", "this CPU", "used"), right=())
    for name, tier in found["isa"].items():
        if not (tier["detected"] or _belongs(name, found["machine"]["architecture"])):
            continue  # another architecture's
        used = "best" if name == found["best"] else "yes" if tier["allowed"] else "no"
        output.add(tiers, name, "yes" if tier["detected"] else "no", used)
    kernels = output.grid("Kernels", ("operation", "tier"), right=())
    for kernel in found["kernels"]:
        output.add(kernels, *kernel.split("/", 1))
    said = [f"  - {problem}" for problem in found["problems"]]
    output.show(
        output.pairs("Machine", _machine_rows(found)),
        tiers,
        kernels,
        "",
        *(["Problems", *said] if said else ["No problems found."]),
    )


def examine() -> dict[str, Any]:
    """Collect everything ``nybble doctor`` shows."""
    from nybble import _nybble, hub
    from nybble.bench import bandwidth, machine

    found: dict[str, Any] = json.loads(_nybble.doctor())
    threads = int(found["threads_default"])
    found["machine"] = {
        "cpu": machine.cpu_name(),
        "architecture": platform.machine(),
        "system": platform.platform(),
        "cpus": machine.cpus(),
        "cpus_in_machine": os.cpu_count(),
        "memory": machine.memory(),
        "huge_pages": machine.huge_pages(),
    }
    found["bandwidth"] = {str(count): bandwidth(count) for count in sorted({1, threads})}
    found["python"] = platform.python_version()
    found["environment"] = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    found["cache"] = str(hub.cache_dir())
    found["problems"] = problems(found)
    return found


def problems(found: dict[str, Any]) -> list[str]:
    """Return what keeps this machine from running as fast as it could, one sentence each."""
    said = []
    tiers, best, machine = found["isa"], found["best"], found["machine"]
    barred = [name for name, tier in tiers.items() if tier["detected"] and not tier["allowed"]]
    if barred:
        said.append(f"NYBBLE_ISA keeps {', '.join(barred)} from being used.")
    elif best == "scalar":
        said.append(
            f"This CPU ({machine['architecture']}) has none of the instruction sets there are "
            "kernels for: everything runs in portable code, many times slower."
        )
    slow = [name for name in found["kernels"] if name.endswith("/scalar") and best != "scalar"]
    if slow:
        operations = ", ".join(name.split("/")[0] for name in slow)
        said.append(f"No {best} kernel for {operations}: portable code does it.")
    threads = found["threads_default"]
    if threads > machine["cpus"]:
        said.append(
            f"{threads} threads on {machine['cpus']} CPUs: they wait for each other. "
            f"Set NYBBLE_THREADS to {machine['cpus']} or less."
        )
    elif threads < machine["cpus"] and "NYBBLE_THREADS" not in found["environment"]:
        said.append(
            f"{threads} of {machine['cpus']} CPUs are used: a quota of this container allows "
            "no more."
        )
    rates = [found["bandwidth"][count] for count in sorted(found["bandwidth"], key=int)]
    if len(rates) > 1 and rates[-1] < 0.9 * rates[0]:
        said.append(
            "Several threads read memory more slowly than one: other programs are using it now."
        )
    if machine["huge_pages"] == "never":
        said.append(
            "Transparent huge pages are off: reading weights is slower. `madvise` in "
            "/sys/kernel/mm/transparent_hugepage/enabled lets nybble ask for them."
        )
    available = machine["memory"]["available"]
    if available is not None and available < 512e6:
        said.append(f"Only {available / 1e6:.0f} MB of memory are free.")
    return said


def _belongs(tier: str, architecture: str) -> bool:
    """Whether a tier is one of this architecture's."""
    arm = architecture.lower() in ("aarch64", "arm64")
    return tier.startswith("neon") == arm


def _machine_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    from nybble.cli import output

    machine = found["machine"]
    total, available = machine["memory"]["total"], machine["memory"]["available"]
    rates = ", ".join(
        f"{rate / 1e9:.1f} GB/s with {count} thread{'s' if count != '1' else ''}"
        for count, rate in found["bandwidth"].items()
    )
    rows = [
        ("nybble", f"{found['version']} on Python {found['python']}"),
        ("system", machine["system"]),
        ("CPU", machine["cpu"]),
        (
            "threads",
            f"{found['threads_default']} (this process may use {machine['cpus']} CPUs, "
            f"the machine has {machine['cpus_in_machine']})",
        ),
        ("memory", f"{output.size(total)}, {output.size(available)} free"),
        ("read bandwidth", rates),
        ("huge pages", machine["huge_pages"] or "not on this system"),
        ("model cache", found["cache"]),
    ]
    settings = [f"{name}={value}" for name, value in found["environment"].items()]
    rows.append(("environment", ", ".join(settings) or "no NYBBLE_ variable is set"))
    return rows
