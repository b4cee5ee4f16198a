"""What a speed figure must be read beside: the CPU, its settings, the memory in use."""

import os
import platform
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """Return the CPU's own name, or the architecture where the system does not say."""
    fields: dict[str, str] = {}
    try:
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    for key in ("model name", "Model", "Hardware", "Processor"):
        if fields.get(key):
            return fields[key]
    if "CPU part" in fields:  # ARM systems give numbers only
        implementer = fields.get("CPU implementer", "?")
        return f"{platform.machine()} implementer {implementer} part {fields['CPU part']}"
    return platform.processor() or platform.machine()


def cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _status_bytes(field: str) -> int | None:
    try:
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def peak_rss() -> int | None:
    """Return the most memory this process ever held, in bytes, where the system says so."""
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_rss() -> bool:
    """Let :func:`peak_rss` start again from the present; says whether the system can do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def huge_pages() -> str | None:
    """Return the system's setting for transparent huge pages, ``None`` where there is none."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    except OSError:
        return None
    start, end = text.find("["), text.find("]")
    return text[start + 1 : end] if 0 <= start < end else text.strip()


def memory() -> dict[str, int | None]:
    """Return the machine's memory in bytes: ``total`` and ``available``."""
    found: dict[str, int | None] = {"total": None, "available": None}
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            key, _, rest = line.partition(":")
            if key in ("MemTotal", "MemAvailable"):
                found[key.removeprefix("Mem").lower()] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return found
