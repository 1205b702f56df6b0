"""Find how much memory of this host a process may still take: what the machine has, and what its
cgroups allow.

A container or a batch job often may use only a part of the machine, and a process that takes more
is killed without a word.
"""

from pathlib import Path

_VERSION_2 = ("", "memory.max", "memory.current", ("active_file", "inactive_file"))
_VERSION_1 = (
    "memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)
"""Folder below the cgroup file system; limit; usage; the part of it that is a cache of files, given
back on demand."""


def free_host_memory_bytes(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> int:
    """``MemAvailable`` of the machine, which can be had without swapping, or what the narrowest
    cgroup leaves of it."""
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024  # in kB, which means KiB
            return min([available, *_left_by_cgroups(proc, cgroups)])
    raise ValueError("/proc/meminfo has no MemAvailable line")


def _left_by_cgroups(proc: Path, cgroups: Path) -> list[int]:
    """What each memory limit above this process leaves; empty where none is set or visible.

    A container sees its own cgroup as the root, while ``/proc/self/cgroup`` may name the machine's
    path to it: so every folder from the root to that path is looked at, and those that do not exist
    are passed over.
    """
    found: list[int] = []
    listed = proc / "self" / "cgroup"
    if not listed.is_file():
        return found
    for line in listed.read_text().splitlines():
        # "4:memory:/job" in version 1; "0::/job", without controllers, in version 2
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        below, limit, usage, caches = _VERSION_1 if controllers else _VERSION_2
        folder = cgroups / below
        for part in ("", *Path(path).parts[1:]):
            folder = folder / part
            if not (folder / limit).is_file():
                continue
            most = (folder / limit).read_text().strip()
            if most == "max":
                continue
            used = int((folder / usage).read_text())
            cached = _cached(folder / "memory.stat", caches)
            found.append(max(0, int(most) - used + cached))
    return found


def _cached(statistics: Path, caches: tuple[str, ...]) -> int:
    """Bytes that count as used and are given back on demand."""
    total = 0
    for row in statistics.read_text().splitlines():
        name, value = row.split()
        if name in caches:
            total += int(value)
    return total
