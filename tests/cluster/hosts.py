"""Two hosts in one machine: network namespaces with addresses and names of their own, joined by a
cable that can be cut."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# The name of the network card on both hosts: each namespace has names of its own.
CARD = "eth0"
NAMES_OF = "127.0.0.1 localhost\n10.77.0.1 host-a\n10.77.0.2 host-b\n10.77.1.2 host-c\n"


@dataclass(frozen=True)
class Host:
    """``space`` is the namespace: a name for ``ip netns``, the same for no two test runs at a
    time."""

    name: str
    address: str
    node_rank: int

    @property
    def space(self) -> str:
        return f"megalora-{os.getpid()}-{self.name}"


HOSTS = (Host("host-a", "10.77.0.1", 0), Host("host-b", "10.77.0.2", 1))
SPARE = Host("host-c", "10.77.1.2", 2)
"""A third host, joined with the first one alone."""
SECOND_CARD = "eth1"


@dataclass
class Node:
    """One host's part of a run: launch/torchrun_node.sh, and what it printed."""

    host: Host
    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def missing() -> str:
    """Why this machine can have no second host; empty when it can."""
    if not sys.platform.startswith("linux") or shutil.which("ip") is None:
        return "needs Linux and the ip command (iproute2)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    name = f"megalora-{os.getpid()}-try"
    # Some containers let root make namespaces but no cable between them, so both are tried.
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode == 0:
        cable = ["ip", "-n", name, "link", "add", "try0", "type", "veth", "peer", "name", "try1"]
        made = subprocess.run(cable, capture_output=True, text=True)
        subprocess.run(["ip", "netns", "del", name], check=True)
    if made.returncode != 0:
        return (
            f"this machine lets root make no network namespaces with a cable: {made.stderr.strip()}"
        )
    return ""


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@contextmanager
def two_hosts() -> Iterator[None]:
    """Both hosts exist, joined, for as long as the block runs; then they and every process on them
    are gone."""
    try:
        for host in HOSTS:
            ip("netns", "add", host.space)
            ip("-n", host.space, "link", "set", "lo", "up")
            _give_names(host)
        first, second = HOSTS
        # A veth pair: what goes into one end comes out of the other.
        one_end = [CARD, "netns", first.space]
        other_end = [CARD, "netns", second.space]
        ip("link", "add", *one_end, "type", "veth", "peer", "name", *other_end)
        for host in HOSTS:
            ip("-n", host.space, "addr", "add", f"{host.address}/24", "dev", CARD)
            ip("-n", host.space, "link", "set", CARD, "up")
        yield
    finally:
        for host in HOSTS:
            remove(host)


@contextmanager
def spare_host() -> Iterator[None]:
    """A third host exists, beside those of ``two_hosts``, for as long as the block runs. It reaches
    the first one, which is what a spare for the second one needs."""
    first = HOSTS[0]
    try:
        ip("netns", "add", SPARE.space)
        ip("-n", SPARE.space, "link", "set", "lo", "up")
        _give_names(SPARE)
        one_end = [SECOND_CARD, "netns", first.space]
        other_end = [CARD, "netns", SPARE.space]
        ip("link", "add", *one_end, "type", "veth", "peer", "name", *other_end)
        ends = ((first, SECOND_CARD, "10.77.1.1"), (SPARE, CARD, SPARE.address))
        for host, card, address in ends:
            ip("-n", host.space, "addr", "add", f"{address}/24", "dev", card)
            ip("-n", host.space, "link", "set", card, "up")
        # By the one address that the first host has for everybody.
        ip("-n", SPARE.space, "route", "add", f"{first.address}/32", "via", "10.77.1.1")
        yield
    finally:
        remove(SPARE)


def _give_names(host: Host) -> None:
    """``ip netns exec`` puts these in the place of /etc's. No name server is in reach, and asking
    one takes 10 s each."""
    folder = Path("/etc/netns") / host.space
    folder.mkdir(parents=True)
    (folder / "hosts").write_text(NAMES_OF)
    (folder / "nsswitch.conf").write_text("hosts: files\n")


def remove(host: Host) -> None:
    kill_all(host)
    subprocess.run(["ip", "netns", "del", host.space], capture_output=True)
    shutil.rmtree(Path("/etc/netns") / host.space, ignore_errors=True)
    # It stays where it holds other namespaces' files.
    with suppress(OSError):
        Path("/etc/netns").rmdir()


def kill_all(host: Host) -> None:
    """End what still runs on a host: torchrun, and ranks that outlived it."""
    shown = subprocess.run(["ip", "netns", "pids", host.space], capture_output=True, text=True)
    for process in shown.stdout.split():
        # It may have ended by itself in between.
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


def cut() -> None:
    """Pull the cable out at the second host. No connection is closed: neither side is told
    anything."""
    ip("-n", HOSTS[1].space, "link", "set", CARD, "down")


def mend() -> None:
    ip("-n", HOSTS[1].space, "link", "set", CARD, "up")


def received_bytes(host: Host) -> int:
    """What has come in over the cable so far."""
    (card,) = json.loads(ip("-n", host.space, "-j", "-s", "link", "show", CARD))
    return card["stats64"]["rx"]["bytes"]


def start(folder: Path, port: int, config: Path, *overrides: str) -> list[Node]:
    """Call launch/torchrun_node.sh on both hosts, with two ranks on each."""
    nodes = []
    for host in HOSTS:
        # Without restarts a lost host ends the run, where it would otherwise be started anew.
        settings = {
            "NNODES": "2", "NODE_RANK": str(host.node_rank), "NPROC_PER_NODE": "2",
            "MASTER_ADDR": HOSTS[0].name, "MASTER_PORT": str(port), "MAX_RESTARTS": "0",
        }  # fmt: skip
        script = ROOT / "launch" / "torchrun_node.sh"
        nodes.append(call(host, folder, [script, config, *overrides], settings))
    return nodes


def call(host: Host, folder: Path, command: list[Any], settings: dict[str, str]) -> Node:
    """Begin a command on a host, which speaks into a file of ``folder``."""
    # A job that this test itself runs in must not be taken for that of the two hosts.
    of_a_job = re.compile(r"SLURM|PET_|NNODES|NODE_|MASTER|NPROC|RDZV|LOCAL_|TRITON")
    outside = {}
    for name, value in os.environ.items():
        if not of_a_job.match(name):
            outside[name] = value
    # Gloo talks over the cable alone.
    everywhere = {
        "GLOO_SOCKET_IFNAME": CARD, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    log = folder / f"{host.name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["ip", "netns", "exec", host.space, *command], cwd=ROOT,
            env=outside | everywhere | settings, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return Node(host, process, log)


def ended(nodes: list[Node], within_s: float) -> list[int]:
    """Exit codes, once both have ended; an assertion that shows both logs when they do not in
    ``within_s`` seconds."""
    began = time.monotonic()
    running = list(nodes)
    while running and time.monotonic() - began < within_s:
        # A copy, because nodes are removed.
        for node in list(running):
            if node.process.poll() is not None:
                running.remove(node)
        time.sleep(0.1)
    if running:
        for node in nodes:
            kill_all(node.host)
    names = [node.host.name for node in running]
    assert not running, f"{names} still running after {within_s:.0f} s\n{logs(nodes)}"
    return [node.process.returncode for node in nodes]


def logs(nodes: list[Node]) -> str:
    return "\n".join(f"--- {node.host.name}\n{node.said()}" for node in nodes)
