"""How much memory there is, and what would not fit into it.

A refusal that comes before anything is allocated names the option; one that the system makes names
nothing, or kills the process.
"""

from __future__ import annotations

from pathlib import Path

from wara.errors import WaraError

_MEMINFO = Path("/proc/meminfo")
# Of a container: the limit and what is used of it, in the two forms that Linux has.
_CONTAINERS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def available_memory() -> int | None:
    """Return the bytes that a process may still take, or None where the system does not say."""
    found = []
    for line in _text(_MEMINFO).splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            found.append(1024 * int(rest.split()[0]))
    for limit, used in _CONTAINERS:
        most, now = _text(limit).strip(), _text(used).strip()
        if most.isdecimal() and now.isdecimal():
            found.append(max(0, int(most) - int(now)))
    return min(found, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # another system, or no container
        return ""


def check_memory(wanted: int, what: str, where: str, remedy: str) -> None:
    """Refuse what cannot fit into memory.

    Args:
        wanted: bytes.
        what: that needs them, such as `the backbone`.
        where: the option that decides it.
        remedy: what to do about it.

    Raises:
        WaraError: kind `resources`.
    """
    free = available_memory()
    if free is not None and wanted > free:
        said = f"{what} needs {wanted / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        raise WaraError("resources", said, where, remedy)
