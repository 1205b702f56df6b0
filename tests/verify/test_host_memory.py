"""Check how much memory a host has left, where the machine, a container or a batch job's cgroup is
the narrowest."""

from pathlib import Path

import pytest

from megalora.verify.host_memory import free_host_memory_bytes

# The kernel's file counts in units of 1,024 bytes; MemAvailable counts, cache that can be freed
# included.
MEMINFO = "MemTotal:       4000000 kB\nMemFree:        1000000 kB\nMemAvailable:   2000000 kB\n"
MACHINE = 2_000_000 * 1024


def host(root: Path, listed: str | None, files: dict[str, str]) -> int:
    """What is free on a host with these cgroup files."""
    proc = root / "proc"
    cgroups = root / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO)
    if listed is not None:
        (proc / "self" / "cgroup").write_text(listed)
    for name, text in files.items():
        (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / name).write_text(text)
    return free_host_memory_bytes(proc, cgroups)


def second(folder: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    """The files of cgroups, version 2, in a folder that ends in "/" or is empty."""
    stat = f"anon 5\nactive_file {cached}\ninactive_file 1\n"
    return {
        f"{folder}memory.max": f"{limit}\n",
        f"{folder}memory.current": f"{used}\n",
        f"{folder}memory.stat": stat,
    }


def first(folder: str, limit: int, used: int) -> dict[str, str]:
    """The files of cgroups, version 1; of the cache the total counts, with the groups below."""
    at = f"memory/{folder}memory"
    stat = "active_file 7\ntotal_active_file 30\ntotal_inactive_file 4\n"
    return {
        f"{at}.limit_in_bytes": f"{limit}\n",
        f"{at}.usage_in_bytes": f"{used}\n",
        f"{at}.stat": stat,
    }


@pytest.mark.parametrize(
    ("listed", "files", "free"),
    [
        # No cgroups, none that limit memory.
        (None, {}, MACHINE),
        ("0::/\n", {}, MACHINE),
        ("0::/\n", second("", "max", 10), MACHINE),
        # A container, which sees its own cgroup as the root: 1000 - 900, and 50 + 1 of cached
        # files, which the kernel frees when it has to. Beyond the limit nothing is left.
        ("0::/\n", second("", "1000", 900, 50), 151),
        ("0::/\n", second("", "1000", 1200), 0),
        # A batch job's step under its job: the limit of either may be the narrower.
        (
            "0::/job_7/step_0\n",
            second("job_7/", "1000", 300) | second("job_7/step_0/", "max", 300),
            701,
        ),
        (
            "0::/job_7/step_0\n",
            second("job_7/", "1000", 300) | second("job_7/step_0/", "400", 100),
            301,
        ),
        # Another job's limit is nothing to us.
        ("0::/job_7\n", second("job_8/", "1000", 300), MACHINE),
        # Version 1: 1000 - 500 + 30 + 4.
        ("5:cpu,memory:/job_7\n4:pids:/\n0::/\n", first("job_7/", 1000, 500), 534),
        # A container that sees the machine's path, under which it has no files.
        ("5:memory:/docker/0a1b\n0::/\n", first("", 1000, 500), 534),
        # How version 1 writes "no limit", and a group that limits something else.
        ("5:memory:/\n", first("", 2**63 - 4096, 500), MACHINE),
        ("5:cpu:/job_7\n", first("job_7/", 1000, 500), MACHINE),
    ],
)
def test_the_narrowest_limit_counts(
    tmp_path: Path, listed: str | None, files: dict[str, str], free: int
) -> None:
    assert host(tmp_path, listed, files) == free


def test_this_host_has_some() -> None:
    # Between a mebibyte and a pebibyte: bytes, not pages or kibibytes.
    assert 2**20 < free_host_memory_bytes() < 2**50
